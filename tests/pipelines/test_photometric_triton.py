"""The photometric chain's GPU kernels, in Triton's interpreter, against the reference in float64."""

import numpy as np
import pytest
import torch

from pipelines.draw import draw_views
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION
from pipelines.photometric import reference
from pipelines.photometric.chain import photometric_chain
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines import triton_interpreter
from tests.pipelines.betons import needs_data
from tests.pipelines.triton_inputs import (
    ALL_ORDERS,
    COLOURS,
    EVERYTHING,
    FACTORS,
    random_crops,
    real_crops,
    view_params,
)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ROUNDING = 2e-5  # four float32 operations on [0, 1], where contrast and hue magnify what came before
# On [0, 1]. A blur in float16 rounds each value before either axis, by 2⁻¹² at most. Its weights, which end after 4 σ,
# are too high or too low by 3.7e-4 together on each axis: `test_the_weights_of_the_blur_in_float16`.
WEIGHTS = 3.7e-4
PLANES = 2 * 2**-12 + 2 * WEIGHTS
# Beside it the result's own rounding: float16's 2⁻¹², and bfloat16's 2⁻⁸, which the interpreter truncates.
DTYPES = {torch.float32: ROUNDING, torch.float16: PLANES + 2**-12, torch.bfloat16: PLANES + 2**-8}


def check(crops, params, atol=ROUNDING, dtype=torch.float32, recipe=None, layout="channels_last", **probs):
    """Hold the kernels against the reference; returns the kernels' result."""
    view = ViewRecipe(size=crops.shape[-1], **probs)
    recipe = Recipe(views=(view,), **(recipe or {}))
    ours = triton_interpreter.photometric(crops, params, view, recipe, dtype, layout=layout)
    exact = reference.photometric(crops, params, view, recipe, dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=0, atol=atol)
    return ours


def drawn(num, size, seed=0, **probs):
    """Parameters as a recipe draws them, and the recipe."""
    view = ViewRecipe(size=size, **probs)
    recipe = Recipe(views=(view,), **IMAGENET)
    extent = np.full(num, 100, np.int32)
    return draw_views(recipe, seed, 0, np.arange(num), extent, extent)[:, 0], view, recipe


def test_each_jitter_operation_at_every_strength():
    params = view_params(20)
    for op in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
        strengths = np.array([-1.0, -0.4, 0.0, 0.3, 1.0])
        chosen = params[5 * op : 5 * op + 5]
        chosen["jitter_order"][:, 2] = op
        chosen["jitter_factor"][:, op] = 0.5 * strengths if op == HUE else 1.0 + strengths
    check(random_crops(20, 20), params, atol=3e-6, jitter_prob=1.0)


def test_the_jitter_in_every_order():
    params = view_params(24, jitter_order=ALL_ORDERS, jitter_factor=FACTORS)
    check(random_crops(24, 17), params, jitter_prob=1.0)


@needs_data
def test_the_whole_chain_in_every_order_on_photographs():
    params = view_params(24, jitter_order=ALL_ORDERS, jitter_factor=FACTORS)
    params["gray"][3::4], params["blur_sigma"][::2] = True, 1.3
    params["solarize_threshold"][::3] = 0.5
    probs = COLOURS | {"blur_prob": 0.5, "solarize_prob": 0.2}
    check(real_crops(24, 41), params, atol=ROUNDING / 0.224, recipe=IMAGENET, **probs)


def test_contrast_is_relative_to_the_whole_image_where_it_takes_several_programs():
    params = view_params(2, jitter_order=[[HUE, NO_OP, CONTRAST, NO_OP], [CONTRAST, NO_OP, NO_OP, BRIGHTNESS]])
    params["jitter_factor"] = FACTORS
    check(random_crops(2, 96), params, jitter_prob=1.0)


def test_gray():
    check(random_crops(4, 20), view_params(4, gray=[True, False, True, True]), atol=1e-6, gray_prob=1.0)


@pytest.mark.parametrize(("size", "num"), [(20, 5), (32, 5), (41, 5), (96, 5), (224, 1)])
def test_blur(size, num):
    # Sigmas at which the kernel's width, its reach of 5.7 σ, and neither cuts off the weights; and no blur.
    params = view_params(num, blur_sigma=[1.7, 0.1, 0.7, 1e-20, 0.0][:num])
    check(random_crops(num, size), params, atol=2e-6, blur_prob=1.0)


def test_a_blur_kernel_of_one_pixel_changes_nothing():
    check(random_crops(2, 19), view_params(2, blur_sigma=1.0), atol=1e-6, blur_prob=1.0)


def test_solarize():
    params = view_params(4, solarize_threshold=[0.5, 0.25, 0.0, np.inf])
    check(random_crops(4, 20), params, atol=1e-6, solarize_prob=1.0)


def test_rotate():
    check(random_crops(4, 21), view_params(4, quarter_turns=[0, 1, 2, 3]), atol=1e-6, rotate_prob=1.0)


@pytest.mark.parametrize("size", [2, 21])
def test_sobel(size):
    params = view_params(4, sobel=[True, True, False, True], solarize_threshold=[np.inf, 0.6, 0.6, np.inf])
    check(random_crops(4, size) // 4, params, atol=3e-6, sobel_prob=1.0, solarize_prob=1.0)


def test_noise():
    rng = np.random.default_rng(0)
    params = view_params(4, noise_std=[0.2, 0.05, 0.0, 1.0], noise_key=rng.integers(0, 2**64, 4, dtype=np.uint64))
    check(random_crops(4, 20), params, atol=3e-6, noise_prob=1.0)


def test_cutout_leaves_exact_zeros():
    params = view_params(3, cutout_top=[0, 5, 0], cutout_left=[3, 0, 0])
    params["cutout_height"], params["cutout_width"] = [8, 15, 0], [17, 1, 0]
    ours = check(random_crops(3, 20), params, atol=1e-5, recipe=IMAGENET, cutout_prob=1.0)
    assert (ours[0, :, :8, 3:] == 0).all()
    assert (ours[2] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "num"), [(32, 12), (41, 12), (96, 4), (224, 1)])
def test_every_dtype(dtype, size, num):
    params = view_params(num, jitter_order=ALL_ORDERS[::2][:num], jitter_factor=FACTORS)
    params["gray"][3::4], params["blur_sigma"][::2] = True, 0.9
    check(random_crops(num, size), params, DTYPES[dtype], dtype, **COLOURS, blur_prob=0.5)


@pytest.mark.parametrize(("size", "num"), [(20, 5), (32, 5), (33, 5), (41, 5), (96, 5), (224, 1)])
def test_blur_in_float16(size, num):
    params = view_params(num, blur_sigma=[2.0, 0.1, 0.65, 1e-20, 0.0][:num])
    crops = random_crops(num, size)
    crops[1:2] = 255
    check(crops, params, DTYPES[torch.float16], torch.float16, blur_prob=1.0)


def test_the_weights_of_the_blur_in_float16():
    sigmas = np.append(np.linspace(0.1, 2.0, 20), [0.6468, 0.7069]).astype(np.float32)  # two of the worst ones
    view = ViewRecipe(size=200, blur_prob=1.0)
    ours = triton_interpreter.blur_weights(view_params(len(sigmas), blur_sigma=sigmas), view)
    radius = view.blur_kernel // 2
    mirrored = np.pad(np.eye(view.size), [(radius, radius), (0, 0)], mode="reflect")
    for matrix, sigma in zip(ours, sigmas.astype(np.float64), strict=True):
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        exact = sum(tap * mirrored[i : i + view.size] for i, tap in enumerate(taps / taps.sum()))
        error = matrix - exact
        assert error.clip(min=0).sum(axis=1).max() < WEIGHTS
        assert error.clip(max=0).sum(axis=1).min() > -WEIGHTS


def test_a_blur_in_float16_that_is_wider_than_a_tile_s_window():
    crops, params = random_crops(1, 180), view_params(1, blur_sigma=4.0)
    check(crops, params, DTYPES[torch.float16], torch.float16, blur_prob=1.0, blur_sigma=(0.1, 4.0))
    with pytest.raises(ValueError, match=r"drawn from this view, whose `blur_sigma` is at most 2.0, got 4.0"):
        check(crops, params, dtype=torch.float16, blur_prob=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blur_and_sobel(dtype):
    params = view_params(4, blur_sigma=[1.7, 0.0, 0.6, 1.0], sobel=[True, True, False, True])
    atol = ROUNDING if dtype == torch.float32 else 8 * DTYPES[dtype]  # a Sobel kernel's weights sum to 8
    check(random_crops(4, 40) // 4, params, atol, dtype, blur_prob=1.0, sobel_prob=1.0)


@pytest.mark.parametrize("size", [20, 33])
def test_everything_that_a_recipe_can_ask_for(size):
    params, view, recipe = drawn(24, size, seed=1, **EVERYTHING)
    assert (params["sobel"] & (params["blur_sigma"] > 0)).any()
    crops = random_crops(24, size)
    ours = triton_interpreter.photometric(crops, params, view, recipe)
    exact = reference.photometric(crops, params, view, recipe, dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=0, atol=8 * ROUNDING / 0.224)  # a Sobel kernel's weights sum to 8


@pytest.mark.parametrize("size", [17, 18])
@pytest.mark.parametrize("layout", [name for name in triton_interpreter.LAYOUTS if name != "channels_last"])
def test_crops_may_lie_in_any_way(layout, size):
    params = view_params(3, jitter_order=ALL_ORDERS[[5, 9, 20]], jitter_factor=FACTORS)
    crops = random_crops(3, size)
    aligned = check(crops, params, jitter_prob=1.0)
    assert torch.equal(check(crops, params, layout=layout, jitter_prob=1.0), aligned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_alone_is_bit_equal_to_itself_in_a_batch_and_in_small_groups(dtype):
    params, view, recipe = drawn(12, 20, seed=2, **EVERYTHING)
    crops = random_crops(12, 20)
    together = triton_interpreter.photometric(crops, params, view, recipe, dtype)
    two_images = 2 * 3 * 20 * 20 * 4
    assert torch.equal(
        together, triton_interpreter.photometric(crops, params, view, recipe, dtype, planes_bytes=two_images)
    )
    for i in (0, 5, 11):
        alone = triton_interpreter.photometric(crops[i : i + 1], params[i : i + 1], view, recipe, dtype)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize(("num", "size"), [(0, 32), (1, 1), (3, 2), (1, 32)])
def test_few_and_small_images(num, size):
    params = view_params(num, jitter_order=ALL_ORDERS[7], jitter_factor=FACTORS, gray=True, blur_sigma=1.0)
    check(random_crops(num, size), params, **COLOURS, blur_prob=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("probs", [COLOURS | {"blur_prob": 0.5}, EVERYTHING], ids=["simclr", "everything"])
@pytest.mark.parametrize("size", [31, 64, 96, 224])
def test_recipes_as_they_are_drawn(size, probs):
    params, view, recipe = drawn(8, size, seed=3, **probs)
    crops = random_crops(8, size)
    ours = triton_interpreter.photometric(crops, params, view, recipe)
    exact = reference.photometric(crops, params, view, recipe, dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=0, atol=8 * ROUNDING / 0.224)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "numba", "reference"])
def test_the_entry_on_the_cpu(backend, dtype):
    params, view, recipe = drawn(6, 32, **COLOURS)
    crops = random_crops(6, 32)
    ours = photometric_chain(crops, params, view, recipe, dtype, backend)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    exact = reference.photometric(crops, params, view, recipe, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=ROUNDING / 0.224)


def test_the_entry_says_what_does_not_fit():
    params, view, recipe = drawn(2, 32, **COLOURS)
    crops = random_crops(2, 32)
    with pytest.raises(ValueError, match="'triton' works on CUDA tensors, got cpu"):
        photometric_chain(crops, params, view, recipe, backend="triton")
    with pytest.raises(ValueError, match=r"`backend` must be .*, got 'cuda'"):
        photometric_chain(crops, params, view, recipe, backend="cuda")
    with pytest.raises(ValueError, match=r"uint8 \[N, 3, 32, 32\] .* got torch.float32 \[2, 3, 32, 32\]"):
        photometric_chain(crops.float(), params, view, recipe)
    with pytest.raises(ValueError, match=r"got torch.uint8 \[2, 3, 16, 32\]"):
        photometric_chain(crops[:, :, ::2], params, view, recipe)
    with pytest.raises(ValueError, match=r"VIEW_PARAMS \[2\], one for each crop, got shape \(1,\)"):
        photometric_chain(crops, params[:1], view, recipe)
    with pytest.raises(ValueError, match=r"`dtype` must be .*, got torch.float64"):
        photometric_chain(crops, params, view, recipe, torch.float64)
