"""Which combinations a sweep has; options changed in a configuration; a sample of the user's images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import MODE_RAW, open_beton
from pipelines.build import DataConfig, open_data
from tests.pipelines.betons import make_beton
from tools.image_encoding import EncodeOptions
from tools.profile_rig import changed, only_steps, shares_engine
from tools.profile_sample import encode_options, on_sample, rows_for, write_sample
from tools.profile_surroundings import survey
from tools.profile_sweep import best_of, grid
from train.config import PretrainConfig
from train.online.config import OnlineConfig
from train.runtime import choose_device, read_ranks


def configured(path="set.beton", **data):
    return PretrainConfig(name="run", data=DataConfig(path=str(path), **{"global_batch_size": 8} | data))


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("set"), [(60 + 4 * i, 90 - 2 * i) for i in range(12)])


def test_a_sweep_has_every_loader_batch_and_number_of_threads_and_begins_with_the_run_s_own():
    cells = grid(configured(num_threads=3), 8)
    assert len(cells) == 3 * (4 + 4 + 1)  # `resident` has no threads while it runs
    assert {cell.num_threads for cell in cells if cell.loader == "ffcv"} == {1, 3, 4, 8}
    assert {cell.global_batch_size for cell in cells} == {4, 8, 16}
    assert cells[0].is_now
    assert (cells[0].loader, cells[0].num_threads, cells[0].global_batch_size) == ("ffcv", 3, 8)
    assert sum(cell.is_now for cell in cells) == 1
    assert [cell.global_batch_size for cell in cells] == sorted(
        (cell.global_batch_size for cell in cells), key=[8, 16, 4].index
    )
    assert best_of(cells) is None


def test_a_folder_is_swept_with_the_loader_of_folders(tmp_path):
    assert {cell.loader for cell in grid(configured(tmp_path, loader="folder"), 2)} == {"folder"}


def test_an_option_is_changed_and_checked_as_on_the_command_line():
    config = changed(configured(), {"data.num_threads": 4, "train.micro_batch_size": None, "train.precision": "fp32"})
    assert (config.data.num_threads, config.train.precision) == (4, "fp32")
    with pytest.raises(ValueError, match=r"there is no option `data\.workers`"):
        changed(configured(), {"data.workers": 4})
    with pytest.raises(ValueError, match=r"`data\.geometry` device needs `data\.loader` ffcv, got dali"):
        changed(configured(geometry="device"), {"data.loader": "dali"})


def test_what_the_loader_alone_knows_of_leaves_the_engine():
    assert shares_engine(["data.num_threads", "train.cpu_threads", "data.path"])
    assert not shares_engine(["data.num_threads", "data.global_batch_size"])
    assert not shares_engine(["train.precision"])


def test_a_run_that_is_measured_has_no_place_and_nobody_watches_it():
    config = PretrainConfig(name="run", data=DataConfig(path="x"), online=OnlineConfig(linear_probe=True))
    steps = only_steps(config)
    assert not steps.run_dir.parent.is_dir()
    assert not steps.online.linear_probe
    assert steps.data == config.data


def test_a_sample_stored_as_it_is_has_the_same_bytes(beton, tmp_path):
    write_sample(beton, tmp_path / "sample.beton", None, num_rows=30, workers=1)
    sample = open_beton(tmp_path / "sample.beton")
    assert sample.num_samples == 30
    for i in range(30):
        assert np.array_equal(sample.encoded(i), beton.encoded(i % 12))
        assert sample.labels[i] == beton.labels[i % 12]


@pytest.mark.parametrize(
    "options", [EncodeOptions(max_side=40), EncodeOptions(encode="raw"), EncodeOptions(quality=30)]
)
def test_a_sample_stored_otherwise_is_what_the_converter_makes_of_it(beton, tmp_path, options):
    write_sample(beton, tmp_path / "sample.beton", options, num_rows=12, workers=2)
    sample = open_beton(tmp_path / "sample.beton")
    longest = np.maximum(beton.widths, beton.heights)
    assert np.maximum(sample.widths, sample.heights).tolist() == np.minimum(longest, options.max_side).tolist()
    assert set(sample.modes == MODE_RAW) == {options.encode == "raw"}
    if options.quality == 30:
        assert sample.sizes.sum() < 0.7 * beton.sizes.sum()
    if options.encode == "raw":
        with Image.open(io.BytesIO(beton.encoded(3).tobytes())) as image:
            assert np.array_equal(sample.encoded(3), np.asarray(image).ravel())


def test_raw_images_are_stored_otherwise_too(tmp_path):
    raw = make_beton(tmp_path, [(20, 30)] * 3, encode="raw")
    write_sample(raw, tmp_path / "sample.beton", EncodeOptions(quality=95), num_rows=3, workers=1)
    sample = open_beton(tmp_path / "sample.beton")
    with Image.open(io.BytesIO(sample.encoded(2).tobytes())) as image:
        stored, decoded = raw.encoded(2).reshape(30, 20, 3).mean((0, 1)), np.asarray(image).mean((0, 1))
    assert decoded == pytest.approx(stored, abs=3)  # red, green and blue stay what they are
    assert np.ptp(stored) > 10


def test_a_folder_s_sample_is_of_its_files(beton, tmp_path):
    folder = beton.path.parent / "images"
    data = open_data(DataConfig(path=str(folder), loader="folder"))
    write_sample(data, tmp_path / "sample.beton", EncodeOptions(encode="raw"), num_rows=12, workers=1)
    sample = open_beton(tmp_path / "sample.beton")
    assert sample.widths.tolist() == beton.widths.tolist()
    assert sample.labels.tolist() == beton.labels.tolist()


def test_a_run_on_a_sample_is_the_same_but_for_its_data():
    moved = on_sample(configured(loader="folder", num_threads=3), Path("sample.beton"))
    assert (moved.data.path, moved.data.loader, moved.data.num_threads) == ("sample.beton", "ffcv", 3)
    assert on_sample(configured(), Path("other.beton")).model == configured().model


@pytest.mark.parametrize(("batch", "rows"), [(8, 64), (256, 2048), (1024, 2048), (4096, 8192)])
def test_a_sample_has_batches_enough(batch, rows):
    assert rows_for(configured(global_batch_size=batch)) == rows


def test_advice_of_the_encoding_reads_as_the_converter_s_options():
    assert encode_options({"convert.max_side": 256, "convert.quality": 75}) == EncodeOptions(max_side=256, quality=75)


def test_the_surroundings_are_those_of_the_set(beton):
    around = survey(beton, choose_device("cpu", read_ranks()))
    assert around.stored == "jpeg"
    assert around.set_bytes == beton.sizes.sum()
    assert around.longest_side == np.median(np.maximum(beton.widths, beton.heights))
    assert around.mean_pixels == pytest.approx((beton.widths.astype(int) * beton.heights).mean())
    assert around.cached == 1.0
    assert 0 < around.free_memory <= around.device_memory
    files = survey(
        open_data(DataConfig(path=str(beton.path.parent / "images"), loader="folder")),
        choose_device("cpu", read_ranks()),
    )
    assert files.stored == "files"
    assert files.set_bytes == sum(path.stat().st_size for path in (beton.path.parent / "images").rglob("*.png"))
