"""Noise, and the operations of SimCLR's figure 4 that its code lacks, against others' implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torchvision.transforms.v2 import functional as F

from pipelines.params import BRIGHTNESS, VIEW_PARAMS
from pipelines.photometric import reference
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.draws import (
    SIGNIFICANT,
    draw,
    one_branch,
    plain_bits,
)


def noise_of(params, size=64, std=2.0**-10):
    """The noise alone, in standard deviations: on mid-gray, where nothing is clipped."""
    p = params.copy()
    p["noise_std"] = std
    gray = torch.full((len(p), 3, size, size), 0.5, dtype=torch.float64)
    return ((reference.add_noise(gray, p) - gray) / std).numpy().reshape(len(p), -1)


def test_noise_is_normal():
    _, first, _ = one_branch("noise", num=16)
    noise = noise_of(first)
    assert stats.kstest(noise.reshape(-1), "norm").pvalue > SIGNIFICANT
    num = noise.size
    assert abs(noise.mean()) < 5 / np.sqrt(num)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * num)
    assert abs(stats.skew(noise.reshape(-1))) < 5 * np.sqrt(6 / num)
    assert abs(stats.kurtosis(noise.reshape(-1))) < 5 * np.sqrt(24 / num)


def test_noise_is_unrelated_between_pixels_channels_samples_views_and_epochs():
    view = ViewRecipe(size=64, noise_prob=1.0)
    recipe = Recipe(views=(view, view))
    draws = [draw(recipe, 4).reshape(-1), draw(recipe, 4, epoch=1).reshape(-1), draw(recipe, 4, seed=1).reshape(-1)]
    noise = noise_of(np.concatenate(draws))
    correlations = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlations).max() < 5 / np.sqrt(noise.shape[1])
    for lag in (1, 2, 3, 64, 192):  # values of one image against its neighbours, in both layouts
        assert abs(np.corrcoef(noise[:, :-lag].reshape(-1), noise[:, lag:].reshape(-1))[0, 1]) < 5 / np.sqrt(noise.size)


def test_noise_has_the_drawn_deviation_and_is_clipped():
    params = np.zeros(3, VIEW_PARAMS)
    params["noise_key"], params["noise_std"] = [1, 2, 3], [0.0, 0.05, 0.2]
    gray = torch.full((3, 3, 96, 96), 0.5, dtype=torch.float64)
    noisy = reference.add_noise(gray, params)
    assert torch.equal(noisy[0], gray[0])
    assert noisy[1].std().item() == pytest.approx(0.05, rel=0.02)
    # A normal clipped at ±2.5 standard deviations: its second moment by the textbook.
    c = 2.5
    second = 1 - 2 * stats.norm.sf(c) - 2 * c * stats.norm.pdf(c) + 2 * c**2 * stats.norm.sf(c)
    assert noisy[2].std().item() == pytest.approx(0.2 * math.sqrt(second), rel=0.02)
    assert (noisy.min(), noisy.max()) == (0.0, 1.0)


def test_noise_is_the_stated_formula():
    params = np.zeros(1, VIEW_PARAMS)
    params["noise_key"], params["noise_std"] = 12345, 0.1
    noisy = reference.add_noise(torch.full((1, 3, 5, 5), 0.5, dtype=torch.float64), params)
    for y, x, channel in ((0, 0, 0), (0, 0, 2), (0, 4, 1), (3, 2, 0), (4, 4, 2)):
        word = plain_bits(12345, (y * 5 + x) * 3 + channel)
        u, w = ((word >> 40) + 1) / 2**24, (word >> 16 & 0xFFFFFF) / 2**24
        noise = float(np.float32(0.1)) * math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * w)
        assert noisy[0, channel, y, x].item() == pytest.approx(0.5 + noise, abs=1e-12)


# The operations.


def pictures(num=4, size=33):
    return torch.rand((num, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def luma(images):
    return F.rgb_to_grayscale(images)[:, 0].numpy()


def test_rotation_is_torchvisions():
    x = pictures()
    rotated = reference.rotate(x, torch.arange(4))
    for turns in range(4):
        assert torch.equal(rotated[turns], x[turns].rot90(turns, (-2, -1)))
        torch.testing.assert_close(rotated[turns], F.rotate(x[turns], 90.0 * turns), rtol=0, atol=1e-12)


def scipys_sobel(images):
    """Image by image: scipy would smooth along the axis of the batch, too."""
    edges = [np.hypot(ndimage.sobel(y, 0, mode="mirror"), ndimage.sobel(y, 1, mode="mirror")) for y in luma(images)]
    return np.stack(edges)


def test_sobel_is_scipys():
    x = 0.2 * pictures() + 0.3 * pictures(size=1)  # most gradients within [0, 1]
    expected = scipys_sobel(x)
    assert (expected < 1).mean() > 0.5
    edges = reference.sobel(x).numpy()
    for channel in range(3):
        np.testing.assert_allclose(edges[:, channel], expected.clip(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rectangle", [(0, 0, 5, 7), (10, 3, 23, 1), (32, 32, 1, 1), (0, 0, 33, 33), (0, 0, 0, 0)])
def test_cutout_is_torchvisions_erase(rectangle):
    x, fill = pictures(2), (0.485, 0.456, 0.406)
    columns = [torch.tensor([0, value]) for value in rectangle]
    filled = reference.cutout(x, *columns, fill=fill)
    assert torch.equal(filled[0], x[0])
    assert torch.equal(filled[1], F.erase(x[1], *rectangle, torch.tensor(fill, dtype=torch.float64)[:, None, None]))


def test_cutout_is_zero_after_normalisation():
    view = ViewRecipe(size=33, cutout_prob=1.0)
    recipe = Recipe(views=(view,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    params = draw(recipe, 4)[:, 0]
    views = reference.photometric((pictures() * 255).to(torch.uint8), params, view, recipe)
    for p, image in zip(params, views, strict=True):
        top, left = p["cutout_top"], p["cutout_left"]
        assert (image[:, top : top + p["cutout_height"], left : left + p["cutout_width"]] == 0).all()


def test_the_chain_applies_its_operations_in_the_stated_order():
    view = ViewRecipe(
        size=33, rotate_prob=1.0, jitter_prob=1.0, brightness=0.4, gray_prob=1.0, blur_prob=1.0, solarize_prob=1.0,
        sobel_prob=1.0, noise_prob=1.0, cutout_prob=1.0,
    )  # fmt: skip
    recipe = Recipe(views=(view,), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    crops = (pictures(1) * 255).to(torch.uint8)
    p = draw(recipe, 1, first=5)[:, 0]
    x = crops.double() / 255
    x = x.rot90(int(p["quarter_turns"][0]), (-2, -1))
    x = F.adjust_brightness(x, float(p["jitter_factor"][0, BRIGHTNESS]))
    x = F.rgb_to_grayscale(x, num_output_channels=3)
    x = F.gaussian_blur(x, [view.blur_kernel] * 2, [float(p["blur_sigma"][0])] * 2)
    x = F.solarize(x, 0.5)
    edges = scipys_sobel(x).clip(0, 1)
    noise = noise_of(p, size=33).reshape(1, 3, 33, 33) * float(p["noise_std"][0])
    x = (torch.from_numpy(edges)[:, None].expand(1, 3, 33, 33) + torch.from_numpy(noise)).clamp(0, 1)
    rectangle = [int(p[f"cutout_{name}"][0]) for name in ("top", "left", "height", "width")]
    x = F.erase(x, *rectangle, torch.tensor(recipe.mean, dtype=torch.float64)[:, None, None])
    x = F.normalize(x, list(recipe.mean), list(recipe.std))
    ours = reference.photometric(crops, p, view, recipe, torch.float64)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-8)
