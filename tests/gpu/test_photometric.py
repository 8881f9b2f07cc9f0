"""The photometric chain on a GPU, against the reference in float64."""

import numpy as np
import pytest
import torch

from pipelines.draw import draw_views
from pipelines.photometric import reference
from pipelines.photometric.chain import photometric_chain
from pipelines.photometric.triton_launch import photometric_triton
from pipelines.recipe import Recipe, ViewRecipe
from tests.gpu.waiting import no_waiting
from tests.pipelines.betons import needs_data
from tests.pipelines.triton_inputs import (
    ALL_ORDERS,
    COLOURS,
    EVERYTHING,
    FACTORS,
    random_crops,
    real_crops,
    unaligned,
    view_params,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROUNDING = 2e-5  # four float32 operations on [0, 1], where contrast and hue magnify what came before
# On [0, 1]: a blur in float16 (two roundings by 2⁻¹², and weights that are off by 3.7e-4 on each axis, as the
# interpreter's test measures), and the result's own rounding.
PLANES = 2 * 2**-12 + 2 * 3.7e-4
DTYPES = {torch.float32: ROUNDING, torch.float16: PLANES + 2**-12, torch.bfloat16: PLANES + 2**-9}
RECIPES = {
    "simclr224": ViewRecipe(size=224, **COLOURS, blur_prob=0.5),
    "dino96": ViewRecipe(size=96, **COLOURS, blur_prob=0.5),
    "cifar32": ViewRecipe(size=32, **COLOURS),
    "odd41": ViewRecipe(size=41, **COLOURS, blur_prob=0.5),
    "even50": ViewRecipe(size=50, **COLOURS, blur_prob=0.5),
    "wide224": ViewRecipe(size=224, **COLOURS, blur_prob=0.5, blur_sigma=(0.1, 4.0)),
}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def drawn(num, view, seed=0, **normalisation):
    """Parameters as a recipe draws them, and the recipe."""
    recipe = Recipe(views=(view,), **normalisation)
    extent = np.full(num, 300, np.int32)
    return draw_views(recipe, seed, 0, np.arange(num), extent, extent)[:, 0], recipe


def check(crops, params, view, recipe, dtype=torch.float32, atol=ROUNDING):
    ours = photometric_chain(crops.cuda(), params, view, recipe, dtype)
    assert ours.is_cuda
    assert ours.dtype == dtype
    assert ours.is_contiguous(**CHANNELS_LAST)
    exact = reference.photometric(crops, params, view, recipe, dtype=torch.float64)
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=0, atol=atol)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_in_every_dtype(name, dtype):
    view = RECIPES[name]
    params, recipe = drawn(24, view)
    check(random_crops(24, view.size), params, view, recipe, dtype, DTYPES[dtype])


@pytest.mark.parametrize("size", [20, 96, 224])
def test_everything_that_a_recipe_can_ask_for(size):
    view = ViewRecipe(size=size, **EVERYTHING)
    params, recipe = drawn(24, view, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    check(random_crops(24, size), params, view, recipe, atol=8 * ROUNDING / 0.224)  # Sobel's weights sum to 8


@needs_data
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_on_photographs(dtype):
    params = view_params(24, jitter_order=ALL_ORDERS, jitter_factor=FACTORS)
    params["gray"][3::4], params["blur_sigma"][::2] = True, 1.3
    view = ViewRecipe(size=224, **COLOURS, blur_prob=0.5)
    check(real_crops(24, 224), params, view, Recipe(views=(view,)), dtype, DTYPES[dtype])


@pytest.mark.parametrize("num", [0, 1, 700])
def test_any_number_of_images(num):
    view = ViewRecipe(size=64, **COLOURS, blur_prob=0.5)
    params, recipe = drawn(num, view)
    check(random_crops(num, 64), params, view, recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time_alone_and_in_groups_of_any_size(dtype):
    view = ViewRecipe(size=96, **EVERYTHING)
    params, recipe = drawn(64, view)
    crops = random_crops(64, 96).cuda()
    together = photometric_triton(crops, params, view, recipe, dtype)
    assert torch.equal(together, photometric_triton(crops, params, view, recipe, dtype))
    ten_images = 10 * 96 * 96 * 3 * 4
    assert torch.equal(together, photometric_triton(crops, params, view, recipe, dtype, planes_bytes=ten_images))
    for i in (0, 7, 63):
        alone = photometric_triton(crops[i : i + 1], params[i : i + 1], view, recipe, dtype)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("size", [41, 64])
def test_crops_may_lie_in_any_way(size):
    view = ViewRecipe(size=size, **COLOURS, blur_prob=0.5)
    params, recipe = drawn(5, view)
    crops = random_crops(5, size).cuda()
    expected = photometric_chain(crops, params, view, recipe)
    thinned = crops.repeat_interleave(2, dim=2)[:, :, ::2]
    for other in (crops.contiguous(**CHANNELS_LAST), unaligned(crops), thinned):
        assert torch.equal(photometric_chain(other, params, view, recipe), expected)


def test_images_beyond_two_gigabytes():
    view = ViewRecipe(size=224, **COLOURS, blur_prob=0.5)
    num = 2**31 // (3 * 224 * 224) + 100
    params, recipe = drawn(num, view)
    crops = torch.empty((num, 3, 224, 224), dtype=torch.uint8, device="cuda", **CHANNELS_LAST)
    crops.random_(0, 256)
    together = photometric_chain(crops, params, view, recipe, torch.bfloat16)
    for i in (0, num // 2, num - 1):
        alone = photometric_chain(crops[i : i + 1], params[i : i + 1], view, recipe, torch.bfloat16)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_neither_waits_for_the_device_nor_leaves_the_current_stream(dtype):
    view = ViewRecipe(size=64, **COLOURS, blur_prob=0.5)
    params, recipe = drawn(32, view)
    crops = random_crops(32, 64).cuda()
    expected = photometric_chain(crops, params, view, recipe, dtype)  # compiles
    stream = torch.cuda.Stream()
    later = torch.empty_like(crops)
    torch.cuda.synchronize()
    with no_waiting(), torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # what comes after it on this stream comes late
        later.copy_(crops)
        ours = photometric_chain(later, params, view, recipe, dtype)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_it_runs_where_the_crops_are():
    view = ViewRecipe(size=32, **COLOURS)
    params, recipe = drawn(8, view)
    crops = random_crops(8, 32)
    with torch.cuda.device(0):
        there = photometric_chain(crops.to("cuda:1"), params, view, recipe)
    assert there.device == torch.device("cuda:1")
    assert torch.equal(there.cpu(), photometric_chain(crops.to("cuda:0"), params, view, recipe).cpu())


def test_the_cpus_backend_is_refused():
    view = ViewRecipe(size=32)
    params, recipe = drawn(2, view)
    with pytest.raises(ValueError, match="'numba' works on CPU tensors, got cuda"):
        photometric_chain(random_crops(2, 32).cuda(), params, view, recipe, backend="numba")
