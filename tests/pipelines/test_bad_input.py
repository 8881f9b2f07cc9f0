"""Images that no recipe was made for: each gives its views, or an answer that names the sample."""

import dataclasses
import gc
import threading
import time

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.beton import open_beton
from pipelines.build import DataConfig, build_loader, open_data
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.betons import make_beton

SIMCLR = build_recipe(AugmentConfig(size=32))


@pytest.fixture
def views():
    loaders = []

    def run(beton, recipe=SIMCLR, **options):
        options = {"seed": 0, "global_batch_size": beton.num_samples, "num_threads": 2} | options
        loaders.append(FFCVLoader(beton, recipe, **options))
        return next(loaders[-1].epoch(0))

    yield run
    for loader in loaders:
        loader.close()


def test_a_sample_of_no_bytes_is_named(views, tmp_path):
    beton = make_beton(tmp_path, [(40, 40)] * 4)
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[2]), int(beton.sizes[2])
    data[start : start + size] = bytes(size)
    beton.path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sample 2 \(class1/0002.png\) of .* cannot be decoded: .*Not a JPEG file"):
        views(open_beton(beton.path))
    sizes = np.where(np.arange(4) == 2, 0, beton.sizes)  # as a table might say
    none = dataclasses.replace(open_beton(beton.path), sizes=sizes)
    with pytest.raises(ValueError, match=r"sample 2 .* cannot be decoded"):
        views(none)


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_image_of_one_pixel_becomes_views_of_its_colour(views, tmp_path, encode, interpolation):
    beton = make_beton(tmp_path, [(1, 1), (1, 1)], encode=encode)
    batch = views(beton, Recipe(views=(ViewRecipe(size=33, interpolation=interpolation),) * 2))
    for view in batch.views:
        assert view.shape == (2, 3, 33, 33)
        assert (view == view[:, :, :1, :1]).all()
    colors = views(beton, Recipe(views=(ViewRecipe(size=1),))).views[0]
    assert torch.equal(batch.views[0][:, :, :1, :1], colors)


@pytest.mark.parametrize(("width", "height"), [(20_000, 30), (30, 20_000)])
def test_a_panorama_gives_views_and_takes_its_memory_with_it(views, tmp_path, width, height):
    beton = make_beton(tmp_path, [(width, height), (50, 50)], encode="raw", max_side=20_000)
    batch = views(beton)
    pixels = beton.encoded(0).reshape(height, width, 3)
    for view in batch.views:
        assert view.isfinite().all()
        assert (view >= 0).all()
        assert (view <= 1).all()
    whole = views(beton, Recipe(views=(ViewRecipe(size=32, crop="whole"),)), training=False).views[0][0]
    means = torch.from_numpy(pixels.reshape(-1, 3).mean(0) / 255)
    torch.testing.assert_close(whole.double().mean((1, 2)), means, rtol=0, atol=5e-3)


def test_windows_of_less_than_a_pixel_are_those_of_torchvision(views, tmp_path):
    # No window of so small an area has a whole pixel: all attempts fail, as torchvision's, and the fallback is taken.
    beton = make_beton(tmp_path, [(20, 10)] * 2, encode="raw")
    tiny = views(beton, Recipe(views=(ViewRecipe(size=8, crop_area=(1e-9, 1e-8)),))).views[0]
    assert tiny.isfinite().all()
    recipe = Recipe(views=(ViewRecipe(size=8, crop_area=(0.004, 0.006)),))  # about one pixel
    one = views(beton, recipe).views[0]
    assert (one == one[:, :, :1, :1]).all()


def test_a_scaled_decode_never_makes_a_window_smaller_than_its_view(views, tmp_path):
    beton = make_beton(tmp_path, [(300, 260)] * 24)
    recipe = Recipe(views=(ViewRecipe(size=16, crop_area=(0.0005, 0.05)), ViewRecipe(size=8, crop_area=(0.0005, 0.05))))
    exact = views(beton, recipe, output="crops")
    scaled = views(beton, recipe, output="crops", scaled_decode=True)
    differences = [(a.int() - b.int()).abs().amax((1, 2, 3)) for a, b in zip(exact.views, scaled.views, strict=True)]
    small = differences[0] == 0
    assert small.any()  # a window was too small, so the image was decoded whole
    assert not small.all()  # and another was not
    assert torch.equal(small, differences[1] == 0)
    mean = np.mean([(a.double() - b.double()).abs().mean() for a, b in zip(exact.views, scaled.views, strict=True)])
    assert mean < 2.0


@pytest.mark.parametrize("loader", ["ffcv", "dali", "resident", "folder"])
def test_more_views_than_memory_are_refused_before_any_is_made(tmp_path, loader):
    beton = make_beton(tmp_path, [(20, 10)] * 4, encode="raw")
    recipe = Recipe(views=(ViewRecipe(size=30_000),) * 500)
    config = DataConfig(
        path=str(tmp_path / "images" if loader == "folder" else beton.path), loader=loader, global_batch_size=4
    )
    ranks = {"seed": 0, "rank": 0, "world_size": 1, "num_cores": 1}
    message = r"batches of 4 images with 500 views need \d+ GB of memory, \d+ GB are free; use a smaller `data"
    with pytest.raises(ValueError, match=message):
        build_loader(config, open_data(config), recipe, device=torch.device("cpu"), dtype=torch.float32, **ranks)


def test_evaluation_of_ugly_images_uses_their_centre(views, tmp_path):
    beton = make_beton(tmp_path, [(1, 200), (200, 1), (3, 2)], encode="raw")
    batch = views(beton, center_recipe(AugmentConfig(size=16)), training=False)
    rows = beton.encoded(1).reshape(200, 3)
    assert (batch.views[0][1] * 255).round()[:, 0, 0].tolist() == rows[99].tolist()


def changed(beton, sample, change, folder):
    """A copy of the file in which one sample's bytes are changed."""
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
    data[start : start + size] = change(bytes(data[start : start + size]))
    path = folder / "changed.beton"
    path.write_bytes(data)
    return open_beton(path)


def unknown_frame(jpeg):
    """A frame header that no decoder knows."""
    return jpeg.replace(b"\xff\xc0\x00\x11", b"\xff\xcf\x00\x11")


def missing_table(jpeg):
    """A quantisation table under a name that no component asks for."""
    at = jpeg.index(b"\xff\xdb") + 4
    return jpeg[:at] + b"\x03" + jpeg[at + 1 :]


@pytest.mark.parametrize("change", [unknown_frame, missing_table])
@pytest.mark.parametrize("loader", ["ffcv", "dali", "resident"])
def test_a_bad_header_spoils_no_other_image_and_is_refused_whatever_came_before(tmp_path, loader, change):
    # One thread, so that all images meet the same decompressor.
    beton = changed(make_beton(tmp_path, [(60, 50)] * 24), 5, change, tmp_path)
    config = DataConfig(path=str(beton.path), loader=loader, global_batch_size=24, num_threads=1, on_error="skip")
    ranks = {"seed": 0, "rank": 0, "world_size": 1, "num_cores": 1}
    made = build_loader(config, beton, SIMCLR, device=torch.device("cpu"), dtype=torch.float32, **ranks)
    try:
        for epoch in range(3):
            indices = next(made.epoch(epoch)).sample_indices.tolist()
            assert sorted(indices) == sorted([i for i in range(24) if i != 5] + [6])
    finally:
        made.close()


def test_a_loader_that_is_dropped_ends_its_threads(tmp_path):
    beton = make_beton(tmp_path, [(20, 20)] * 4, encode="raw")
    before = threading.active_count()
    for _ in range(3):
        next(FFCVLoader(beton, SIMCLR, seed=0, global_batch_size=4, num_threads=2).epoch(0))
        gc.collect()
    deadline = time.monotonic() + 200.0
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_run_of_bad_positions_is_no_run_of_bad_neighbours(tmp_path):
    # Every other row is bad: in a shuffled batch many stand side by side, but each has a good neighbour in the file.
    beton = make_beton(tmp_path, [(20, 20)] * 80)
    data = bytearray(beton.path.read_bytes())
    for start in beton.offsets[::2].tolist():
        data[start : start + 8] = bytes(8)
    beton.path.write_bytes(data)
    for geometry in ("cpu", "device"):
        loader = FFCVLoader(
            open_beton(beton.path), SIMCLR, seed=1, global_batch_size=80, on_error="skip", geometry=geometry
        )
        assert all(sample % 2 for sample in next(loader.epoch(0)).sample_indices.tolist())
        assert loader.num_skipped == 40
        loader.close()


def test_a_closed_loader_says_so(tmp_path):
    loader = FFCVLoader(make_beton(tmp_path, [(20, 20)] * 8), SIMCLR, seed=0, global_batch_size=2)
    batches = loader.epoch(0)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        list(batches)
