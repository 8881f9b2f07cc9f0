import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest, manifest_path
from tests.pipelines.handmade_beton import HandmadeBeton, Sample
from tests.tools.ugly_images import jpeg, picture, saved
from tools.convert import convert
from tools.image_encoding import EncodeOptions
from tools.verify import verify

FILES = {
    "a/0.jpg": jpeg(picture(40, 60)),
    "a/1.png": saved(picture(33, 47), "PNG"),
    "b/0.jpg": jpeg(picture(50, 30)),
    "b/broken.jpg": b"no image",
    "notes.txt": b"a stray",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with the images in `source`, and jpeg.beton, keep.beton and raw.beton."""
    folder = tmp_path_factory.mktemp("verify")
    for name, data in FILES.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for encode in ("jpeg", "keep", "raw"):
        convert(folder / "source", folder / f"{encode}.beton", EncodeOptions(encode=encode), workers=1)
    return folder


@pytest.fixture
def mine(converted, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(converted, tmp_path / "mine")
    return tmp_path / "mine"


def problems(beton, images=None):
    return list(verify(beton, images, workers=2))


def patch(path, position, data):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def edit_manifest(beton, **changes):
    content = json.loads(manifest_path(beton).read_text())
    manifest_path(beton).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("encode", ["jpeg", "keep", "raw"])
def test_a_good_file_is_proved(converted, encode):
    beton = converted / f"{encode}.beton"
    assert problems(beton) == []
    assert problems(beton, converted / "source") == []


def test_a_flipped_bit_in_a_sample_is_found_by_name(mine):
    path = mine / "jpeg.beton"
    patch(path, int(open_beton(path).offsets[1]) + 300, b"\x55")
    found = problems(path)
    assert len(found) == 2
    assert found[0].startswith("the file's sha256 is ")
    crc32 = f"the manifest's {load_manifest(path).crc32[1]:08x}"
    assert found[1].startswith("sample 1 ('a/1.png'): its crc32 is ")
    assert found[1].endswith(crc32)


def test_a_torn_file_is_refused_by_name(mine):
    path = mine / "raw.beton"
    path.write_bytes(path.read_bytes()[:-24])
    (found,) = problems(path)
    assert "torn: the allocation table has no entry for sample 2" in found


def test_a_wrong_label_is_found(mine):
    path = mine / "raw.beton"
    metadata_start = 24 + 2 * 1041
    patch(path, metadata_start + 2 * 24 + 16, struct.pack("<q", 0))
    found = problems(path)
    assert "sample 2 ('b/0.jpg') has label 0, class 'a', but lies in 'b'" in found
    assert "the classes have [3, 0] samples, by the manifest [2, 1]" in found
    patch(path, metadata_start + 2 * 24 + 16, struct.pack("<q", 2**62))
    assert f"sample 2 ('b/0.jpg') has label {2**62}, class None, but lies in 'b'" in problems(path)


def test_a_table_that_misstates_a_size_is_found(mine):
    path = mine / "keep.beton"
    metadata_start = 24 + 2 * 1041
    patch(path, metadata_start + 1, struct.pack("<HH", 61, 40))
    assert "sample 0 ('a/0.jpg'): it is 60×40 pixels, its table says 61×40" in problems(path)


def test_a_missing_or_foreign_manifest_is_a_problem(mine):
    path = mine / "jpeg.beton"
    manifest_path(path).write_text("{}")
    (found,) = problems(path)
    assert "found another file" in found
    manifest_path(path).unlink()
    (found,) = problems(path)
    assert found == f"{path}.json: no such file; only the tables and the samples are checked"


def test_a_manifest_with_impossible_options_is_a_problem(mine):
    path = mine / "jpeg.beton"
    for options in (
        {},
        {"encode": "png", "max_side": 500, "quality": 90},
        {"encode": "jpeg", "max_side": "many", "quality": 1},
    ):
        edit_manifest(path, options=options)
        (found,) = problems(path, mine / "source")
        assert "its options cannot be understood" in found


def test_damaged_jpegs_are_found_without_a_manifest(tmp_path):
    """As in a file of stock FFCV's: the tables are good, one sample is cut short, another is no JPEG."""
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    samples = [Sample(data, width=60, height=40) for data in (whole, whole[:1000], b"hello")]
    path = tmp_path / "stock.beton"
    path.write_bytes(HandmadeBeton(samples, page_size=1 << 16).build().data)
    found = problems(path)
    assert len(found) == 3
    assert "no such file" in found[0]
    assert found[1] == "sample 1: it is damaged: Premature end of JPEG file"
    assert found[2].startswith("sample 2: it is not an image")


def test_samples_that_cross_a_page_are_found(tmp_path):
    samples = [Sample(bytes(3 * 800), width=800, height=1, mode=1) for _ in range(2)]
    path = tmp_path / "crossing.beton"
    path.write_bytes(HandmadeBeton(samples).build().data)
    assert "sample 1 crosses a page boundary; FFCV's page cache would misread it" in problems(path)


def test_files_that_came_or_went_are_found(mine):
    source = mine / "source"
    (source / "a" / "0.jpg").rename(source / "a" / "9.jpg")
    (source / "c").mkdir()
    (source / "c" / "new.png").write_bytes(FILES["a/1.png"])
    assert problems(mine / "jpeg.beton", source) == [
        "the images have the classes ['a', 'b', 'c'], the manifest ['a', 'b']",
        "'a/9.jpg' is among the images, but not in the manifest",
        "'c/new.png' is among the images, but not in the manifest",
        "'a/0.jpg' is in the manifest, but not among the images",
    ]


def test_a_changed_image_is_found(mine):
    source = mine / "source"
    changed = picture(50, 30).copy()
    changed[10:30] = 255 - changed[10:30]
    (source / "b" / "0.jpg").write_bytes(jpeg(changed))
    (source / "a" / "1.png").write_bytes(b"no more")
    for encode, expected in (
        ("jpeg", "it is not the image of its source (PSNR "),
        ("keep", "its bytes are not those of its source"),
        ("raw", "its bytes are not those of its source"),
    ):
        found = problems(mine / f"{encode}.beton", source)
        assert len(found) == 2
        assert found[0].startswith("sample 1 ('a/1.png'): its source is not an image")
        assert found[1].startswith(f"sample 2 ('b/0.jpg'): {expected}")


def test_re_encoded_images_are_compared_by_pixels_where_bytes_differ(mine):
    """A source written by another encoder at high quality is the same picture; kept bytes must be the same bytes."""
    source = mine / "source"
    (source / "b" / "0.jpg").write_bytes(jpeg(picture(50, 30), quality=97))
    assert problems(mine / "jpeg.beton", source) == []
    assert problems(mine / "keep.beton", source) == ["sample 2 ('b/0.jpg'): its bytes are not those of its source"]


class TestCommand:
    def run(self, *arguments):
        command = [sys.executable, "-m", "tools.verify", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_good_bad_and_misused(self, mine):
        path = mine / "jpeg.beton"
        good = self.run(path, "--images", mine / "source")
        assert (good.returncode, good.stderr) == (0, "")
        assert good.stdout == f"{path}: proved against its manifest and {mine / 'source'}\n"
        edit_manifest(path, sha256="0" * 64)
        bad = self.run(path)
        assert bad.returncode == 1
        assert bad.stdout.splitlines()[-1] == f"{path}: 1 problem"
        misused = self.run(mine / "none.beton")
        assert (misused.returncode, misused.stdout) == (2, "")
        assert misused.stderr == f"error: {mine / 'none.beton'}: no such file\n"
