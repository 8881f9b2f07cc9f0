import zlib

import numpy as np
import pytest

from pipelines.beton import open_beton
from pipelines.beton_layout import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from tests.pipelines.handmade_beton import HandmadeBeton, Sample
from tools.beton_writer import BetonWriter, forecast_bytes
from tools.image_encoding import EncodedImage


def raw(num_pixels, value):
    data = bytes([value]) * (3 * num_pixels)
    return EncodedImage(mode=1, width=num_pixels, height=1, data=data, crc32=zlib.crc32(data), kept=False)


def write(path, samples, *, capacity=None, labelled=True, page_size=MIN_PAGE_SIZE):
    with path.open("xb") as file:
        writer = BetonWriter(file, capacity=capacity or len(samples), labelled=labelled, page_size=page_size)
        for label, sample in enumerate(samples):
            writer.add(sample, label if labelled else None)
        writer.finish()
    return open_beton(path)


def test_byte_for_byte_the_handmade_file(tmp_path):
    samples = [raw(num_pixels, value) for num_pixels, value in ((3, 1), (5, 2), (1, 3))]
    handmade = HandmadeBeton(
        [Sample(s.data, width=s.width, height=1, mode=1, label=i) for i, s in enumerate(samples)],
        page_size=MIN_PAGE_SIZE,
    ).build()
    write(tmp_path / "ours.beton", samples)
    assert (tmp_path / "ours.beton").read_bytes() == handmade.data


def test_fewer_samples_than_room_for_them(tmp_path):
    beton = write(tmp_path / "few.beton", [raw(2, 7)], capacity=200_000)
    assert beton.num_samples == 1
    assert beton.offsets[0] == 3 * MIN_PAGE_SIZE, "200,000 rows of 24 bytes fill two pages and a part of a third"
    assert beton.encoded(0).tolist() == [7] * 6


def test_no_sample_crosses_a_page_and_pages_grow_with_a_large_one(tmp_path):
    sizes = [100, 65_535, 65_535, 300_000 // 3, 65_535, 10]
    rng = np.random.default_rng(0)
    samples = []
    for num_pixels in [300_000, *sizes, 1_000_000, *sizes]:
        data = rng.bytes(3 * num_pixels)
        samples.append(EncodedImage(mode=0, width=1, height=1, data=data, crc32=0, kept=False))
    beton = write(tmp_path / "grown.beton", samples)
    assert beton.page_size == 4 << 20, "3,000,000 bytes need a page of 4 MiB"
    first, last = beton.offsets // beton.page_size, (beton.offsets + beton.sizes - 1) // beton.page_size
    assert np.array_equal(first, last)
    for i, sample in enumerate(samples):
        assert beton.encoded(i).tobytes() == sample.data


def test_without_labels_there_is_no_label_field(tmp_path):
    assert write(tmp_path / "flat.beton", [raw(1, 1), raw(1, 2)], labelled=False).labels is None


@pytest.mark.parametrize("page_size", [0, 4096, 3 << 20, MAX_PAGE_SIZE * 2])
def test_page_sizes_that_ffcv_refuses_are_refused(tmp_path, page_size):
    with pytest.raises(ValueError, match=f"`page_size` must be a power of two, .* got {page_size}"):
        write(tmp_path / "x.beton", [raw(1, 1)], page_size=page_size)


def test_the_forecast_is_close(tmp_path):
    samples = [raw(int(n), 0) for n in np.random.default_rng(0).integers(1000, 60_000, 300)]
    write(tmp_path / "f.beton", samples)
    mean_size = sum(len(sample.data) for sample in samples) / len(samples)
    forecast = forecast_bytes(len(samples), mean_size, labelled=True, page_size=MIN_PAGE_SIZE)
    assert forecast == pytest.approx((tmp_path / "f.beton").stat().st_size, rel=0.1)
