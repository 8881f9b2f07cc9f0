"""Samples that DALI would fail on or decode to something else: named or replaced, as by the other loader."""

import io
import logging
import os

import pytest
import torch

from pipelines.beton import open_beton
from pipelines.dali_loader import DALILoader
from pipelines.ffcv_loader import FFCVLoader
from tests.pipelines.betons import make_beton, natural_image
from tests.pipelines.dali_loaders import CROP, SIMCLR, SIZES, assert_close, loaders_of
from tests.pipelines.handmade_beton import HandmadeBeton, Sample


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("jpeg"), SIZES)


@pytest.fixture
def make_loader(beton):
    with loaders_of(beton) as make:
        yield make


def damaged(beton, sample, change, folder):
    """A copy of the file in which the bytes of one sample are changed to as many or fewer."""
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
    changed = change(bytes(data[start : start + size]))
    assert len(changed) <= size
    data[start : start + size] = changed.ljust(size, b"\0")
    path = folder / beton.path.name
    path.write_bytes(data)
    (folder / (path.name + ".json")).write_bytes((beton.path.parent / (path.name + ".json")).read_bytes())
    return open_beton(path)


def with_end(jpeg):
    """Cut off in the middle, but with an end-of-image marker at the file's end: DALI decodes it without a word."""
    return jpeg[: len(jpeg) // 2].ljust(len(jpeg) - 2, b"\0") + b"\xff\xd9"


def flipped(jpeg):
    data = bytearray(jpeg)
    for i in range(len(data) // 2, len(data) - 10, 40):
        data[i] ^= 0x55
    return bytes(data)


def encoded(size, mode, file_format):
    file = io.BytesIO()
    natural_image(*size, 0).convert(mode).save(file, file_format, **({"quality": 10} if file_format == "JPEG" else {}))
    return file.getvalue()


DAMAGE = {
    "truncated": lambda jpeg: jpeg[: len(jpeg) // 2],
    "truncated, with an end": with_end,
    "flipped bytes": flipped,
    "nothing but zeros": lambda jpeg: b"",
    "another size": lambda jpeg: encoded((20, 30), "RGB", "JPEG"),
    "CMYK": lambda jpeg: encoded((40, 10), "CMYK", "JPEG"),
    "PNG": lambda jpeg: encoded((10, 10), "RGB", "PNG"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_sample_that_cannot_be_decoded_stops_the_run_as_with_the_ffcv_loader(make_loader, beton, tmp_path, change):
    data = damaged(beton, 13, change, tmp_path)
    message = r"sample 13 \(class1/0013.png\) of .*cannot be decoded: "
    loader = make_loader(CROP, data, training=False)
    batches = loader.epoch(0)
    assert next(batches).sample_indices.tolist() == list(range(8))  # found ahead of its batch, told in its turn
    with pytest.raises(ValueError, match=message) as ours:
        next(batches)
    with pytest.raises(ValueError, match=message):  # and again
        list(loader.epoch(1))
    with pytest.raises(ValueError, match=message) as theirs:
        list(make_loader(CROP, data, FFCVLoader, training=False).epoch(0))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_sample_that_cannot_be_decoded_is_replaced_as_by_the_ffcv_loader(
    make_loader, beton, tmp_path, change, caplog
):
    data = damaged(beton, 13, change, tmp_path)
    ours, theirs = (make_loader(SIMCLR, data, kind, on_error="skip") for kind in (DALILoader, FFCVLoader))
    for epoch in range(2):
        with caplog.at_level(logging.WARNING):
            for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
                assert_close(a, b, mean=0.3, highest=20)
        assert ours.num_skipped == theirs.num_skipped == epoch + 1
    assert caplog.text.count("sample 13 (class1/0013.png)") == 2  # each names it once


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_sample_that_is_damaged_after_it_was_checked_is_named(make_loader, beton, tmp_path, on_error):
    data = damaged(beton, 13, lambda jpeg: jpeg, tmp_path)
    loader = make_loader(CROP, data, on_error=on_error, training=False, global_batch_size=4)
    whole = list(loader.epoch(0))
    with data.path.open("r+b") as file:
        half = int(data.sizes[13]) // 2
        file.seek(int(data.offsets[13]) + half)
        file.write(bytes(int(data.sizes[13]) - half))
    os.utime(data.path, ns=(0, data.stamps[0].written_ns))  # as a failing disk leaves it
    if on_error == "raise":
        with pytest.raises(ValueError, match=r"sample 13 .*cannot be decoded: Premature end of JPEG file"):
            list(loader.epoch(0))
        return
    for _ in range(2):
        for before, after in zip(whole, loader.epoch(0), strict=True):
            expected = [14 if sample == 13 else sample for sample in before.sample_indices.tolist()]
            assert after.sample_indices.tolist() == expected
            for i, sample in enumerate(before.sample_indices.tolist()):
                assert torch.equal(before.views[0][i], after.views[0][i]) == (sample != 13)
    assert loader.num_skipped == 2


def test_of_two_bad_batches_the_first_is_named(make_loader, beton, tmp_path):
    # Sample 13 is found ahead; meanwhile DALI fails on sample 1, which was sound when it was checked.
    data = damaged(beton, 13, lambda jpeg: b"", tmp_path)
    loader = make_loader(CROP, data, training=False, global_batch_size=4)
    with pytest.raises(ValueError, match="sample 13"):
        list(loader.epoch(0))
    with data.path.open("r+b") as file:
        file.seek(int(data.offsets[1]))
        file.write(bytes(int(data.sizes[1])))
    os.utime(data.path, ns=(0, data.stamps[0].written_ns))
    with pytest.raises(ValueError, match=r"sample 1 .*cannot be decoded: Not a JPEG file"):
        list(loader.epoch(0))


def test_a_failure_that_no_sample_explains_is_not_swallowed(make_loader):
    loader = make_loader()
    drawn = loader._maker.draw_batch(loader._maker.plan_batch(0, 0), 0)
    with pytest.raises(RuntimeError, match=r"^DALI failed, though it takes each sample by itself: some fault$"):
        loader._find_bad_samples(drawn, RuntimeError("some\nfault"))


@pytest.mark.parametrize("failure", ["std::bad_alloc", "CUDA allocation failed: out of\nmemory"])
def test_want_of_memory_is_blamed_on_no_sample(make_loader, failure):
    loader = make_loader(on_error="skip")
    drawn = loader._maker.draw_batch(loader._maker.plan_batch(0, 0), 0)
    with pytest.raises(RuntimeError, match=r"^DALI ran out of memory; use a smaller `data.global_batch_size`"):
        loader._find_bad_samples(drawn, RuntimeError(failure))
    assert loader.num_skipped == 0


def test_a_file_of_bad_samples_stops_even_when_skipping(make_loader, tmp_path):
    samples = [Sample(bytes(100), 8, 8) for _ in range(40)]
    (tmp_path / "bad.beton").write_bytes(HandmadeBeton(samples).build().data)
    loader = make_loader(CROP, open_beton(tmp_path / "bad.beton"), on_error="skip")
    with pytest.raises(ValueError, match="cannot be decoded: Not a JPEG file"):
        list(loader.epoch(0))


@pytest.mark.parametrize("photometric", ["ours", "dali"])
def test_one_pixel_and_a_panorama_are_images_like_others(make_loader, tmp_path, photometric):
    samples = [
        Sample(encoded(size, "RGB", "JPEG"), *size) for size in [(1, 1), (20000, 3), (3, 20000), (2, 1), (50, 40)]
    ]
    (tmp_path / "odd.beton").write_bytes(HandmadeBeton(samples).build().data)
    data = open_beton(tmp_path / "odd.beton")
    options = {"global_batch_size": 5}
    ours, theirs = (
        make_loader(CROP, data, photometric=photometric, **options),
        make_loader(CROP, data, FFCVLoader, **options),
    )
    for epoch in range(4):
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert_close(a, b, mean=2, highest=40)


def test_a_mixture_of_raw_and_jpeg_samples_is_refused(make_loader, tmp_path):
    samples = [Sample(encoded((8, 8), "RGB", "JPEG"), 8, 8), Sample(bytes(192), 8, 8, mode=1)]
    (tmp_path / "mixed.beton").write_bytes(HandmadeBeton(samples).build().data)
    with pytest.raises(ValueError, match=r"all JPEGs or all raw, found 1 raw ones among the 2 of .*mixed.beton; set"):
        make_loader(CROP, open_beton(tmp_path / "mixed.beton"))
