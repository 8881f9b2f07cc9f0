"""Stock FFCV reads what we write, and we read what it writes: the real package, in a process of its own."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.beton import MODE_JPEG, MODE_RAW, open_beton
from tests.tools.test_convert_shards import PAGE, RAW, SHARD, make_source
from tests.tools.ugly_images import jpeg, picture
from tools.convert import convert, convert_images
from tools.convert_places import Places
from tools.image_encoding import EncodeOptions, shrink

SIZES = {
    "same": [(48, 64)] * 6,
    "varied": [(48, 64), (100, 30), (640, 480), (33, 1000), (200, 200), (50, 60)],
}
STOCK_SIZES = [(30, 50), (64, 40), (700, 900), (1, 1), (333, 200)]
FAST_DECODING = 5  # levels: FFCV asks libjpeg-turbo for its quick, less exact upsampling and IDCT
LABELS = [0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """(folder, what stock FFCV found in our files there)."""
    folder = tmp_path_factory.mktemp("ffcv")
    for kind, sizes in SIZES.items():
        for i, (size, label) in enumerate(zip(sizes, LABELS, strict=True)):
            path = folder / kind / f"class{label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(np.roll(picture(*size), i, axis=2)))
        for encode in ("jpeg", "keep", "raw"):
            convert(folder / kind, folder / f"{kind}_{encode}.beton", EncodeOptions(encode=encode), workers=2)
    convert_images(
        make_source(folder / "large"),
        Places(dest=folder / "large.shards.json", shard_size=SHARD, page_size=PAGE),
        RAW,
        workers=2,
    )
    # FFCV warns on import and hangs rather than fails: hence no filters, and a limit.
    command = [sys.executable, "-W", "ignore", "-m", "tests.tools.stock_ffcv", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder, np.load(folder / "found.npz")


def pixels(beton, i):
    if beton.modes[i] == MODE_RAW:
        return beton.encoded(i).reshape(beton.heights[i], beton.widths[i], 3)
    return np.asarray(Image.open(io.BytesIO(beton.encoded(i).tobytes())))


@pytest.mark.parametrize("name", [f"{kind}_{encode}" for kind in SIZES for encode in ("jpeg", "keep", "raw")])
def test_its_reader_reads_our_tables(exchanged, name):
    folder, found = exchanged
    beton = open_beton(folder / f"{name}.beton")
    image, labels = found[f"{name}.metadata"]["f0"], found[f"{name}.metadata"]["f1"]
    assert found[f"{name}.fields"].tolist() == ["image", "label"]
    assert found[f"{name}.page_size"] == beton.page_size
    assert labels.tolist() == beton.labels.tolist() == LABELS
    assert image["mode"].tolist() == [MODE_RAW if name.endswith("raw") else MODE_JPEG] * 6
    assert np.array_equal(image["data_ptr"], beton.offsets)
    sizes = SIZES[name.split("_")[0]]
    if name != "varied_keep":
        sizes = [(h, w) if max(h, w) <= 500 else (h * 500 // max(h, w), w * 500 // max(h, w)) for h, w in sizes]
    assert list(zip(image["height"].tolist(), image["width"].tolist(), strict=True)) == sizes


def test_its_reader_reads_each_shard(exchanged):
    folder, found = exchanged
    for i in range(3):
        name = f"large-{i:05d}"
        beton = open_beton(folder / f"{name}.beton")
        image, labels = found[f"{name}.metadata"]["f0"], found[f"{name}.metadata"]["f1"]
        assert labels.tolist() == beton.labels.tolist() == ([0, 0, 1][i : i + 1] * 4)
        assert (image["data_ptr"].tolist(), image["width"].tolist()) == (beton.offsets.tolist(), [600] * 4)
        assert found[f"{name}.page_size"] == PAGE


@pytest.mark.parametrize("name", ["same_jpeg", "same_keep", "same_raw", "pages"])
def test_its_loader_gives_our_pixels(exchanged, name):
    folder, found = exchanged
    beton = open_beton(folder / f"{'same_jpeg' if name == 'pages' else name}.beton")
    assert found[f"{name}.labels"].tolist() == LABELS
    expected = np.stack([pixels(beton, i) for i in range(6)])
    difference = np.abs(found[f"{name}.images"].astype(int) - expected)
    assert difference.max() <= (0 if name == "same_raw" else FAST_DECODING)


@pytest.mark.parametrize("encode", ["jpeg", "keep", "raw"])
def test_its_cropping_loaders_read_images_of_many_sizes(exchanged, encode):
    folder, found = exchanged
    beton = open_beton(folder / f"varied_{encode}.beton")
    assert found[f"varied_{encode}.labels"].tolist() == LABELS
    for i in range(6):
        image = pixels(beton, i)
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side]
        expected = cv2.resize(square, (32, 32), interpolation=cv2.INTER_AREA)
        difference = np.abs(found[f"varied_{encode}.center"][i].astype(int) - expected)
        assert difference.max() <= (1 if encode == "raw" else FAST_DECODING)
        crop = found[f"varied_{encode}.random"][i].astype(int)
        assert np.all(crop >= image.min(axis=(0, 1)).astype(int) - FAST_DECODING)
        assert np.all(crop <= image.max(axis=(0, 1)).astype(int) + FAST_DECODING)


def test_we_shrink_as_its_writer_does(exchanged):
    _, found = exchanged
    for size in ((499, 501), (501, 334), (900, 1200), (1600, 1000)):
        assert np.array_equal(found[f"resized.{size[0]}"], shrink(picture(*size), 500))


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_we_read_what_its_writer_writes(exchanged, mode):
    """Its two processes write a float, bytes, the label, an array, the image and JSON, in this order."""
    folder, _ = exchanged
    beton = open_beton(folder / f"stock_{mode}.beton")
    assert (beton.num_samples, beton.page_size) == (10, 1 << 21)
    assert beton.labels.tolist() == [10 - i for i in range(10)]
    assert set(beton.modes.tolist()) == {MODE_JPEG if mode == "jpg" else MODE_RAW}
    for i in range(10):
        expected = shrink(picture(*STOCK_SIZES[i % 5]), 500)
        found = pixels(beton, i)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= (16 if mode == "jpg" else 0)
