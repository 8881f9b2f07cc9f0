"""What fuzzing and reading found: files that asked for memory or time that nobody has, or answered with a traceback."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import BetonError, open_beton
from pipelines.dali_check import JpegCheck
from pipelines.decode.turbojpeg import PIXEL_FORMAT_RGB, Decompressor
from pipelines.ffcv_loader import FFCVLoader
from pipelines.manifest import ManifestError, load_manifest, manifest_path
from pipelines.resident_loader import ResidentLoader
from tests.pipelines.betons import make_beton, natural_image
from tests.pipelines.handmade_beton import ALLOCATION, DESCRIPTOR, HEADER, HandmadeBeton, Sample
from tests.reliability.fuzz_corpus import pillow_jpeg
from tools.convert import convert
from tools.image_encoding import EncodeOptions
from tools.verify import verify

SIMCLR = build_recipe(AugmentConfig(size=16))


def written(folder, *samples):
    path = folder / "set.beton"
    path.write_bytes(HandmadeBeton(list(samples)).build().data)
    return path


def stated_size(jpeg, width, height):
    """Another size in the frame header."""
    at = next(jpeg.index(marker) for marker in (b"\xff\xc0\x00", b"\xff\xc2\x00") if marker in jpeg)
    return jpeg[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 9 :]


def test_more_pixels_than_the_bytes_can_hold_are_refused_at_opening(tmp_path):
    jpeg = pillow_jpeg(20, 20, 0)
    path = written(tmp_path, Sample(jpeg, 20, 20), Sample(jpeg, 65500, 65500))
    message = r"sample 1 cannot be an image of 65500×65500 pixels in \d+ bytes"
    with pytest.raises(BetonError, match=message):
        open_beton(path)
    blank = Sample(jpeg, 8192, 8192)  # what an arithmetic coder may need no more bytes for
    assert open_beton(written(tmp_path, blank)).num_samples == 1


def vast_beton(folder, num_samples=64):
    """Samples of 4 gigapixels, and of bytes enough for them, which are one hole in a sparse file."""
    start, size = 1 << 20, 65500 * 65500 // 512 + 1
    table = start + size + num_samples
    path = folder / "vast.beton"
    with path.open("wb") as file:
        rows = b"".join(b"\0\xdc\xff\xdc\xff" + (start + i).to_bytes(8, "little") for i in range(num_samples))
        file.write(HEADER.pack(2, 1, 1 << 21, num_samples, table) + DESCRIPTOR.pack(2, b"image", b"") + rows)
        file.seek(table)
        file.write(b"".join(ALLOCATION.pack(i, start + i, size) for i in range(num_samples)))
    return open_beton(path)


def dali_check(beton, recipe, *, num_threads, **_):
    return JpegCheck(beton, num_threads)


@pytest.mark.parametrize("loader", [FFCVLoader, ResidentLoader, dali_check])
def test_images_that_do_not_fit_into_memory_are_refused_before_any_is_decoded(tmp_path, loader):
    beton = vast_beton(tmp_path)
    with pytest.raises(ValueError, match=r"GB|GiB") as caught:
        loader(beton, SIMCLR, seed=0, global_batch_size=64, num_threads=64)
    assert "\n" not in str(caught.value)


def test_a_jpeg_of_a_thousand_scans_is_refused(tmp_path):
    jpeg = pillow_jpeg(64, 64, 0, progressive=True)
    begin = jpeg.index(b"\xff\xda")
    end = jpeg.index(b"\xff\xc4", begin)
    bomb = jpeg[:begin] + jpeg[begin:end] * 1000 + jpeg[end:]
    decompressor, out = Decompressor(), np.empty(64 * 64 * 3, np.uint8)
    reason = decompressor.decompress(np.frombuffer(bomb, np.uint8), 64, 64, out, PIXEL_FORMAT_RGB)
    decompressor.close()
    assert "more than 500 scans" in reason
    loader = FFCVLoader(open_beton(written(tmp_path, Sample(bomb, 64, 64))), SIMCLR, seed=0, global_batch_size=1)
    with pytest.raises(ValueError, match=r"sample 0 .* cannot be decoded: .*more than 500 scans"):
        next(loader.epoch(0))
    loader.close()
    problems = list(verify(tmp_path / "set.beton", workers=1))
    assert any("sample 0: it" in problem for problem in problems)


def test_verify_asks_for_no_memory_that_a_jpeg_only_claims(tmp_path):
    path = written(tmp_path, Sample(stated_size(pillow_jpeg(20, 20, 0), 65500, 65500), 20, 20))
    tracemalloc.start()
    try:
        problems = list(verify(path, workers=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert any("65500×65500 pixels" in problem for problem in problems)
    assert peak < 2**28


MANIFEST_CHANGES = {
    "files": [[1, 2, 3], {"a": 1, "b": 2, "c": 3}, ["a", "b", None], "abc", [[], [], []]],
    "crc32": [["1", "2", "3"], [1.5, 2, 3], [True, 2, 3], [-1, 2, 3], [2**32, 2, 3], "abc"],
    "classes": ["ab", [1, 2], [["a"], ["b"]], {"a": 1, "b": 2}, 7, ["class0"]],
    "class_counts": [[2.0, 1], ["2", "1"], [-1, 4], {"2": 1, "1": 2}, 3, None],
    "sha256": [7, None, ["a"]],
    "num_bytes": ["10", 10.0, None, True],
    "num_samples": ["3", 3.0, None],
    "num_converted": ["0", None, 1.5],
    "options": [[], 7, {"encode": ["jpeg"]}, {"max_side": {}}],
    "tools": [[], {"pillow": 13}],
    "quarantined": [7, [7], {"file": "a"}, [{"file": 1, "reason": "b"}], [{"file": "a"}], [["file", "reason"]]],
}


@pytest.mark.parametrize("key", MANIFEST_CHANGES)
def test_a_manifest_whose_values_have_other_types_is_refused(tmp_path, key):
    make_beton(tmp_path, [(20, 20)] * 3, encode="raw")
    path = manifest_path(tmp_path / "set.beton")
    sound = json.loads(path.read_text())
    for value in MANIFEST_CHANGES[key]:
        path.write_text(json.dumps(sound | {key: value}))
        with pytest.raises(ManifestError, match="convert the images anew") as caught:
            load_manifest(tmp_path / "set.beton")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b.png", "", "a//b", ".", "a\0b"])
def test_a_manifest_names_no_file_outside_the_source_folder(tmp_path, name):
    make_beton(tmp_path, [(20, 20)] * 2, encode="raw")
    path = manifest_path(tmp_path / "set.beton")
    sound = json.loads(path.read_text())
    path.write_text(json.dumps(sound | {"files": [name, sound["files"][1]]}))
    with pytest.raises(ManifestError, match="names inside the source folder"):
        load_manifest(tmp_path / "set.beton")


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000, b"1" * 10_000])
def test_a_manifest_of_endless_depth_is_refused(tmp_path, text):
    make_beton(tmp_path, [(20, 20)], encode="raw")
    manifest_path(tmp_path / "set.beton").write_bytes(text)
    with pytest.raises(ManifestError, match="expected"):
        load_manifest(tmp_path / "set.beton")


def test_a_name_with_control_characters_stays_in_its_line(tmp_path):
    beton = make_beton(tmp_path, [(20, 20)] * 2)
    data = bytearray(beton.path.read_bytes())
    data[int(beton.offsets[1]) : int(beton.offsets[1]) + 2] = bytes(2)
    beton.path.write_bytes(data)
    path = manifest_path(beton.path)
    sound = json.loads(path.read_text())
    path.write_text(json.dumps(sound | {"files": ["class0/é.png", "class1/\x1b[2J\n\udcff.png"]}))
    loader = FFCVLoader(open_beton(beton.path), SIMCLR, seed=0, global_batch_size=2)
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        next(loader.epoch(0))
    loader.close()
    assert str(caught.value).isprintable()
    assert r"class1/\x1b[2J\n\udcff.png" in str(caught.value)


def test_nothing_is_written_but_what_was_asked_for(tmp_path):
    """Whatever classes and images are called."""
    for name in ("a..", "b\n", "c\x1b[2J", "%s{0}", "-rf", "$(touch x)", "d;e"):
        (tmp_path / "images" / name).mkdir(parents=True)
        natural_image(8, 8, 0).save(tmp_path / "images" / name / f"{name}.png")
    (tmp_path / "out").mkdir()
    before = set(tmp_path.rglob("*"))
    convert(tmp_path / "images", tmp_path / "out" / "set.beton", EncodeOptions(encode="raw"), workers=1)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "out" / "set.beton", tmp_path / "out" / "set.beton.json"}
    assert load_manifest(tmp_path / "out" / "set.beton").num_samples == 7
    assert list(verify(tmp_path / "out" / "set.beton", tmp_path / "images", workers=1)) == []


def test_the_manifest_of_every_sound_file_is_still_taken(tmp_path):
    for encode in ("jpeg", "keep", "raw"):
        (tmp_path / encode).mkdir()
        beton = make_beton(tmp_path / encode, [(20, 20)] * 3, encode=encode)
        manifest = load_manifest(beton.path)
        assert manifest.num_samples == 3
        assert dataclasses.asdict(manifest)["classes"] == ["class0", "class1"]
