"""Images that no recipe was made for: each gives its views, or an answer that names the sample."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.beton import open_beton
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
    none = dataclasses.replace(beton, sizes=np.where(np.arange(4) == 2, 0, beton.sizes))  # as a table might say
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


def test_more_views_than_memory_are_refused_before_any_is_made(tmp_path):
    beton = make_beton(tmp_path, [(20, 10)] * 4, encode="raw")
    recipe = Recipe(views=(ViewRecipe(size=30_000),) * 500)
    message = r"batches of 4 images with 500 views need \d+ GB of memory, \d+ GB are free; use a smaller batch"
    with pytest.raises(ValueError, match=message) as error:
        FFCVLoader(beton, recipe, seed=0, global_batch_size=4)
    assert re.search(r"`data.batches_ahead`", str(error.value))


def test_evaluation_of_ugly_images_uses_their_centre(views, tmp_path):
    beton = make_beton(tmp_path, [(1, 200), (200, 1), (3, 2)], encode="raw")
    batch = views(beton, center_recipe(AugmentConfig(size=16)), training=False)
    rows = beton.encoded(1).reshape(200, 3)
    assert (batch.views[0][1] * 255).round()[:, 0, 0].tolist() == rows[99].tolist()
