"""The photometric chain against torchvision's functional operations, given the same factors."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION, VIEW_PARAMS
from pipelines.photometric import reference
from pipelines.photometric.numba_kernels import photometric_batch
from pipelines.recipe import Recipe, ViewRecipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = {f"{op}_prob": 1.0 for op in ("rotate", "jitter", "gray", "blur", "solarize", "sobel", "noise", "cutout")}
TORCHVISION = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
TORCHVISIONS_HUE_ERROR = 3e-6  # it turns the hue in float32, whatever it is given


def images(num=4, size=41, seed=0):
    """Random pixels, and flat, gray and saturated images, whose hue and saturation are special cases."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    out[1] = out[1, :1]
    out[2] = torch.tensor([255, 0, 128], dtype=torch.uint8)[:, None, None]
    out[3, :, ::2] = 0
    return out


def params(num, order=(NO_OP,) * 4, factor=(1.0, 1.0, 1.0, 0.0), gray=False, sigma=0.0, threshold=np.inf):
    p = np.zeros(num, VIEW_PARAMS)
    p["jitter_order"], p["jitter_factor"], p["gray"] = order, factor, gray
    p["blur_sigma"], p["solarize_threshold"] = sigma, threshold
    return p


def numba_chain(images_u8, p, view, recipe):
    num, _, size, _ = images_u8.shape
    out = np.empty((num, size, size, 3), np.float32)
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    photometric_batch(images_u8.permute(0, 2, 3, 1).contiguous().numpy(), p, view.blur_kernel, mean, std, out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def both(images_u8, p, recipe=None):
    """The chain by Numba and, in float64, by the reference."""
    view = ViewRecipe(size=images_u8.shape[-1], **EVERYTHING)
    recipe = recipe or Recipe(views=(view,))
    exact = reference.photometric(images_u8, p, view, recipe, dtype=torch.float64)
    return numba_chain(images_u8, p, view, recipe).double(), exact


@pytest.mark.parametrize("op", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.4, 1.0])
def test_each_jitter_operation_is_torchvisions(op, strength):
    factor = 0.5 * strength if op == HUE else 1.0 + 0.8 * strength
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[op] = factor
    x = images()
    numba, exact = both(x, params(4, (op, NO_OP, NO_OP, NO_OP), factors))
    expected = TORCHVISION[op](x.double() / 255, float(np.float32(factor)))
    torch.testing.assert_close(exact, expected, rtol=0, atol=TORCHVISIONS_HUE_ERROR if op == HUE else 1e-9)
    torch.testing.assert_close(numba, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_chain_in_every_order_is_torchvisions(order):
    factors = (1.4, 0.6, 1.7, -0.15)
    x = images(seed=1)
    numba, exact = both(x, params(4, order, factors))
    expected = x.double() / 255
    for op in order:
        expected = TORCHVISION[op](expected, float(np.float32(factors[op])))
    torch.testing.assert_close(exact, expected, rtol=0, atol=TORCHVISIONS_HUE_ERROR)
    torch.testing.assert_close(numba, expected, rtol=0, atol=2e-5)


def test_gray_is_torchvisions():
    x = images()
    numba, exact = both(x, params(4, gray=True))
    expected = F.rgb_to_grayscale(x.double() / 255, num_output_channels=3)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(numba, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [20, 32, 41, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(size, sigma):
    x = images(size=size)
    kernel = ViewRecipe(size=size).blur_kernel
    numba, exact = both(x, params(4, sigma=sigma))
    expected = F.gaussian_blur(x.double() / 255, [kernel, kernel], [float(np.float32(sigma))] * 2)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(numba, expected, rtol=0, atol=2e-6)


def test_gray_blur_and_solarize_one_after_the_other_are_torchvisions():
    x = images()
    numba, exact = both(x, params(4, gray=True, sigma=1.1, threshold=0.4))
    expected = F.rgb_to_grayscale(x.double() / 255, num_output_channels=3)
    expected = F.solarize(F.gaussian_blur(expected, [5, 5], [float(np.float32(1.1))] * 2), float(np.float32(0.4)))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(numba, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_torchs(turns):
    x, p = images(), params(4)
    p["quarter_turns"] = turns
    numba, exact = both(x, p)
    expected = torch.rot90(x.double() / 255, turns, (-2, -1))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(numba, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gray", [False, True])
def test_sobel_noise_and_cutout_after_one_another_agree(gray):
    x, p = images(size=40), params(4, gray=gray, sigma=0.8, threshold=0.6)
    p["sobel"] = [True, False, True, False]
    p["noise_std"] = [0.0, 0.3, 0.1, 0.0]
    p["noise_key"] = np.arange(4) * 2**61 + 12345
    p["cutout_top"], p["cutout_left"], p["cutout_height"], p["cutout_width"] = 3, [0, 5, 20, 10], [20, 0, 7, 37], 20
    recipe = Recipe(views=(ViewRecipe(size=40),), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    numba, exact = both(x, p, recipe)
    torch.testing.assert_close(numba, exact, rtol=0, atol=3e-5)
    assert (numba[0, :, 3:23, :20].abs() < 1e-6).all()  # cut out: the mean, which is 0 once normalised
    assert (numba[0, :, 23:, 20:].std() > 0.1).all()


def test_solarize_is_torchvisions():
    x = images()
    numba, exact = both(x, params(4, threshold=0.5))
    expected = F.solarize(x.double() / 255, 0.5)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(numba, expected, rtol=0, atol=1e-6)


def test_normalize_is_torchvisions():
    x = images()
    view = ViewRecipe(size=41, **EVERYTHING)
    recipe = Recipe(views=(view,), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    numba, exact = both(x, params(4), recipe)
    expected = F.normalize(x.double() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(numba, expected, rtol=0, atol=5e-6)


def test_images_of_one_batch_keep_their_own_parameters():
    x = images()
    p = params(4)
    p["jitter_order"][0] = (HUE, CONTRAST, BRIGHTNESS, SATURATION)
    p["jitter_factor"][0] = (0.7, 1.5, 0.2, 0.1)
    p["gray"][1] = True
    p["blur_sigma"][2] = 1.2
    p["solarize_threshold"][3] = 0.3
    numba, exact = both(x, p)
    for i in range(4):
        alone = both(x[i : i + 1], p[i : i + 1])
        assert torch.equal(numba[i], alone[0][0])
        torch.testing.assert_close(exact[i], alone[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(numba, exact, rtol=0, atol=2e-5)


def test_output_is_channels_last():
    view = ViewRecipe(size=41)
    out = reference.photometric(images(), params(4), view, Recipe(views=(view,)))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.float32
