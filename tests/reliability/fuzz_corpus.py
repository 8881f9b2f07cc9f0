"""The sound `.beton` files that fuzzing begins with: every kind of image, of field and of writer, and small."""

import ctypes
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

from pipelines.beton_layout import MIN_PAGE_SIZE, MODE_JPEG, MODE_RAW
from pipelines.decode.turbojpeg import library
from tests.pipelines.betons import natural_image
from tests.pipelines.handmade_beton import HandmadeBeton, Sample
from tools.convert import convert
from tools.image_encoding import EncodeOptions, encode_jpeg

TJSAMP_420 = 2


def pillow_jpeg(width, height, seed, mode="RGB", **options):
    """A JPEG by Pillow, as `--encode keep` leaves it alone."""
    file = io.BytesIO()
    natural_image(width, height, seed).convert(mode).save(file, "JPEG", quality=80, **options)
    return file.getvalue()


def our_jpeg(width, height, seed):
    """A JPEG by our converter, with the index of its rows."""
    return encode_jpeg(np.array(natural_image(width, height, seed)), 90)


def arithmetic_jpeg(width, height, seed):
    """An arithmetic-coded one: libjpeg-turbo makes it if the environment says so."""
    turbojpeg = library()
    turbojpeg.tjInitCompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(turbojpeg.tjInitCompress())
    pixels = np.ascontiguousarray(natural_image(width, height, seed))
    out, size = ctypes.c_void_p(), ctypes.c_ulong()
    os.environ["TJ_ARITHMETIC"] = "1"
    try:
        source = ctypes.c_void_p(pixels.ctypes.data)
        sizes = width, 0, height, 0
        targets = ctypes.byref(out), ctypes.byref(size)
        assert turbojpeg.tjCompress2(handle, source, *sizes, *targets, TJSAMP_420, 80, 0) == 0
        return ctypes.string_at(out, size.value)
    finally:
        del os.environ["TJ_ARITHMETIC"]
        turbojpeg.tjFree(out)
        turbojpeg.tjDestroy(handle)


def jpegs():
    """One of each kind: (bytes, width, height)."""
    kinds = [
        ((61, 90), {"subsampling": "4:2:0"}),
        ((40, 33), {"subsampling": "4:4:4"}),
        ((33, 40), {"subsampling": "4:2:2", "restart_marker_rows": 1}),
        ((48, 64), {"progressive": True}),
        ((17, 70), {"mode": "L"}),
        ((30, 20), {"mode": "CMYK"}),
        ((64, 64), {"restart_marker_blocks": 1, "comment": b"a comment", "exif": b"Exif\0\0" + bytes(30)}),
    ]
    made = [(pillow_jpeg(*size, i, **options), *size) for i, (size, options) in enumerate(kinds)]
    made += [(our_jpeg(width, height, 9), width, height) for width, height in ((40, 150), (90, 61), (1, 40), (8, 8))]
    return [*made, (arithmetic_jpeg(50, 41, 5), 50, 41)]


def raw_sample(width, height, seed):
    return Sample(np.array(natural_image(width, height, seed)).tobytes(), width, height, MODE_RAW, seed)


def make_corpus(folder: Path):
    """Write the files: `*.beton` in `folder`."""
    images = [Sample(*jpeg, MODE_JPEG, label) for label, jpeg in enumerate(jpegs())]
    raws = [raw_sample(*size, i) for i, size in enumerate(((8, 8), (1, 1), (3, 17), (40, 9), (5, 5)))]
    handmade = {
        "raw": raws,
        "jpeg": images,
        "mixed": [item for pair in zip(images, raws, strict=False) for item in pair],
        "one_raw": raws[:1],
        "one_indexed": images[7:8],
        "many": [raw_sample(4, 4, i) for i in range(70)],
        **{f"one_jpeg_{i}": [image] for i, image in enumerate(images)},
    }
    for name, samples in handmade.items():
        (folder / f"{name}.beton").write_bytes(HandmadeBeton(samples, page_size=1 << 14).build().data)
    for i, size in enumerate(((50, 40), (20, 90), (33, 33))):
        path = folder / "images" / f"class{i // 2}" / f"{i}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        natural_image(*size, i).save(path)
    for encode in ("jpeg", "keep", "raw"):  # by our own writer, with manifests
        options = EncodeOptions(encode=encode)
        with redirect_stderr(io.StringIO()):
            convert(
                folder / "images", folder / f"converted_{encode}.beton", options, workers=1, page_size=MIN_PAGE_SIZE
            )
    command = [sys.executable, "-m", "tests.reliability.fuzz_corpus", str(folder)]
    subprocess.run(
        command, check=True, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def write_by_stock_ffcv(folder):
    """FFCV's own writer, with a field of every kind; in a process of its own, since it starts others."""
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Pictures:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            text = np.frombuffer(b"caption" * (i % 3), np.uint8)
            return 0.5 * i, text, 10 - i, np.full(3, i, np.float32), natural_image(30 + i, 50, int(i)), {"i": int(i)}

    for mode in ("jpg", "raw"):
        fields = {
            "weight": FloatField(),
            "caption": BytesField(),
            "class": IntField(),
            "vector": NDArrayField(np.dtype("<f4"), (3,)),
            "photo": RGBImageField(write_mode=mode),
            "extra": JSONField(),
        }
        path = folder / f"stock_{mode}.beton"
        DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(Pictures(), chunksize=4)


if __name__ == "__main__":
    write_by_stock_ffcv(Path(sys.argv[1]))
