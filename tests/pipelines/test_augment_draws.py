"""What is drawn: the distributions that the papers state, and the numbers themselves."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import RandomResizedCrop

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.draws import (
    NUM,
    PHOTO,
    SIGNIFICANT,
    assert_probability,
    assert_uniform,
    draw,
    one_branch,
    plain_bits,
    plain_key,
)

WINDOW = ("top", "left", "height", "width")


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "byol", "dino"])
def test_factors_sigmas_and_probabilities_are_the_recipes(name):
    recipe = build_recipe(AugmentConfig(recipe=name))
    params = draw(recipe)
    for v, view in enumerate(recipe.views):
        p = params[:, v]
        for op, strength in ((BRIGHTNESS, view.brightness), (CONTRAST, view.contrast), (SATURATION, view.saturation)):
            assert_uniform(p["jitter_factor"][:, op], 1 - strength, 1 + strength)
        assert_uniform(p["jitter_factor"][:, HUE], -view.hue, view.hue)
        assert_uniform(p["blur_sigma"][p["blur_sigma"] > 0], 0.1, 2.0)
        assert_probability(p["flip"], view.flip_prob)
        assert_probability(p["jitter_order"][:, 0] != NO_OP, view.jitter_prob)
        assert_probability(p["gray"], view.gray_prob)
        assert_probability(p["blur_sigma"] > 0, view.blur_prob)
        assert_probability(np.isfinite(p["solarize_threshold"]), view.solarize_prob)
        assert set(p["solarize_threshold"].tolist()) <= {0.5, math.inf}


def test_draws_are_independent_of_one_another():
    view = ViewRecipe(
        size=32, flip_prob=0.5, rotate_prob=0.75, jitter_prob=0.5, brightness=0.8, contrast=0.8, saturation=0.8,
        hue=0.2, gray_prob=0.5, blur_prob=0.5, solarize_prob=0.5, sobel_prob=0.5, noise_prob=0.5, cutout_prob=0.5,
    )  # fmt: skip
    params = draw(Recipe(views=(view, view)))
    columns = []
    for p in (params[:, 0], params[:, 1], draw(Recipe(views=(view,)), epoch=1)[:, 0]):
        columns += [p["flip"], p["quarter_turns"], p["jitter_order"][:, 0] == NO_OP, p["gray"], p["blur_sigma"] > 0]
        columns += [np.isinf(p["solarize_threshold"]), p["sobel"], p["noise_std"] > 0, p["cutout_height"] > 0]
        columns += [*p["jitter_factor"].T, p["left"] / np.maximum(PHOTO[0] - p["width"], 1), p["width"] / p["height"]]
    correlations = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5.5 / np.sqrt(NUM)  # of 990 pairs


@pytest.mark.parametrize("recipe", ["moco_v2", "dino"])
def test_windows_are_distributed_as_torchvisions(recipe):
    view = build_recipe(AugmentConfig(recipe=recipe)).views[-1]
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(view.size, scale=view.crop_area), torch.empty(3, PHOTO[1], PHOTO[0])
    theirs = [transform.make_params([image]) for _ in range(10_000)]
    ours, quantiles = draw(Recipe(views=(view,)))[:, 0], np.linspace(0.05, 0.95, 10)
    for quantity in (lambda p: p["height"] * p["width"], lambda p: p["width"] / p["height"]):
        np.testing.assert_allclose(
            np.quantile(quantity(ours), quantiles), np.quantile([quantity(p) for p in theirs], quantiles), rtol=0.05
        )


def test_all_24_orders_of_the_jitter_are_equally_likely():
    order = draw(build_recipe(AugmentConfig()))["jitter_order"].reshape(-1, 4)
    order = order[order[:, 0] != NO_OP]
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SIGNIFICANT


def test_quarter_turns_are_equally_likely():
    _, first, _ = one_branch("rotate", num=NUM)
    turns, counts = np.unique(first["quarter_turns"], return_counts=True)
    assert turns.tolist() == [0, 1, 2, 3]
    assert stats.chisquare(counts).pvalue > SIGNIFICANT


@pytest.mark.parametrize(
    ("size", "share", "side"), [(32, 0.5, 16), (9, 0.5, 4), (10, 0.3, 3), (7, 1.0, 7), (4, 0.1, 1)]
)
def test_cutouts_are_squares_around_a_uniform_pixel_clipped_to_the_view(size, share, side):
    # DeVries and Taylor's cutout.py: y = randint(h); rows clip(y − length // 2, 0, h) to clip(y + length // 2, 0, h),
    # for their even lengths; an odd side has its centre pixel in the middle.
    recipe = Recipe(views=(ViewRecipe(size=size, cutout_prob=1.0, cutout_side=share),))
    p = draw(recipe)[:, 0]
    centers = np.arange(size)
    low = np.clip(centers - side // 2, 0, size)
    high = np.clip(centers - side // 2 + side, 0, size)
    expected = sorted(zip(low.tolist(), (high - low).tolist(), strict=True))
    for begin, extent in (("cutout_top", "cutout_height"), ("cutout_left", "cutout_width")):
        found, counts = np.unique(np.stack([p[begin], p[extent]], 1), axis=0, return_counts=True)
        assert sorted(set(expected)) == [tuple(pair) for pair in found.tolist()]
        weights = np.array([expected.count(tuple(pair)) for pair in found.tolist()])
        assert stats.chisquare(counts, NUM * weights / size).pvalue > SIGNIFICANT
    assert abs(stats.pearsonr(p["cutout_top"], p["cutout_left"]).statistic) < 5 / np.sqrt(NUM) or size == side


def test_standard_deviations_of_the_noise_are_uniform():
    _, first, _ = one_branch("noise", num=NUM)
    assert_uniform(first["noise_std"], 0.0, 0.2)


# The numbers, by plain integers and the recipe's arithmetic.


def plain_window(key, width, height):
    """A window of area (0.08, 1) and aspect (3/4, 4/3): top, left, height, width."""
    u = [(plain_bits(key, d) >> 11) / 2**53 for d in range(34)]
    for attempt in range(10):
        area = (0.08 + u[attempt] * 0.92) * width * height
        aspect = float(np.float32(math.exp(math.log(3 / 4) + u[16 + attempt] * (math.log(4 / 3) - math.log(3 / 4)))))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[32] * (height - h + 1)), int(u[33] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (height - h) // 2, (width - w) // 2, h, w


def plain_simclr(seed, epoch, sample, view, width, height):
    """One view of SimCLR's recipe."""
    key = plain_key(seed, epoch, sample, view)
    u = [(plain_bits(key, d) >> 11) / 2**53 for d in range(47)]
    return {
        "window": plain_window(key, width, height),
        "flip": u[34] < 0.5,
        "order": sorted(range(4), key=lambda op: u[40 + op]) if u[35] < 0.8 else [-1] * 4,
        "factor": [0.2 + 1.6 * u[36], 0.2 + 1.6 * u[37], 0.2 + 1.6 * u[38], -0.2 + 0.4 * u[39]],
        "gray": u[44] < 0.2,
        "sigma": 0.1 + 1.9 * u[46] if u[45] < 0.5 else 0.0,
    }


def described(p):
    return {
        "window": tuple(int(p[name]) for name in WINDOW),
        "flip": bool(p["flip"]),
        "order": p["jitter_order"].tolist(),
        "factor": pytest.approx(p["jitter_factor"].tolist(), rel=1e-6),
        "gray": bool(p["gray"]),
        "sigma": pytest.approx(float(p["blur_sigma"]), rel=1e-6),
    }


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (42, 99), (2**63 - 1, 3)])
@pytest.mark.parametrize("size", [(500, 375), (32, 32), (100, 900), (3, 4000)])
def test_draws_are_those_of_plain_integers(seed, epoch, size):
    params = draw(build_recipe(AugmentConfig()), 50, seed=seed, epoch=epoch, first=1_281_000, size=size)
    for i in range(50):
        for v in range(2):
            assert described(params[i, v]) == plain_simclr(seed, epoch, 1_281_000 + i, v, *size)


def test_the_other_draws_are_those_of_plain_integers():
    plain = ViewRecipe(size=20, crop="whole", shared_crop=True)
    view = dataclasses.replace(
        plain, rotate_prob=0.75, solarize_prob=0.2, sobel_prob=0.3, noise_prob=0.6, cutout_prob=0.5, cutout_side=0.3
    )
    params = draw(Recipe(views=(plain, view)), 60, seed=9, epoch=2, first=1000)
    for i in range(60):
        shared = plain_window(plain_key(9, 2, 1000 + i, 0x736861726564), *PHOTO)  # "shared"
        assert [described(p)["window"] for p in params[i]] == [shared, shared]
        key, p = plain_key(9, 2, 1000 + i, 1), params[i, 1]
        u = [(plain_bits(key, d) >> 11) / 2**53 for d in range(57)]
        assert p["solarize_threshold"] == (0.5 if u[47] < 0.2 else math.inf)
        assert p["quarter_turns"] == (1 + int(3 * u[49]) if u[48] < 0.75 else 0)
        assert p["sobel"] == (u[50] < 0.3)
        assert p["noise_std"] == pytest.approx(0.2 * u[52] if u[51] < 0.6 else 0.0, rel=1e-6)
        assert p["noise_key"] == plain_bits(key, 53)
        top, left = (max(int(20 * u[d]) - 3, 0) for d in (55, 56))
        bottom, right = (min(int(20 * u[d]) + 3, 20) for d in (55, 56))
        rectangle = (top, left, bottom - top, right - left) if u[54] < 0.5 else (0, 0, 0, 0)
        assert tuple(p[f"cutout_{name}"] for name in WINDOW) == rectangle


GOLDEN = {  # by (seed, epoch, sample, view), from an image of 500 × 375; made by `plain_simclr`
    (0, 0, 0, 0): {
        "window": (49, 27, 298, 323),
        "flip": True,
        "order": [0, 1, 3, 2],
        "factor": [0.718049904, 1.64410374, 1.45341476, 0.116286603],
        "gray": False,
        "sigma": 0.0,
    },
    (0, 0, 0, 1): {
        "window": (20, 236, 190, 240),
        "flip": False,
        "order": [2, 1, 0, 3],
        "factor": [0.694603244, 0.316847781, 1.15297518, -0.135634974],
        "gray": False,
        "sigma": 0.0,
    },
    (0, 1, 7, 0): {
        "window": (53, 146, 305, 338),
        "flip": True,
        "order": [-1, -1, -1, -1],
        "factor": [1.76290522, 0.508076431, 0.297625478, -0.00744009616],
        "gray": True,
        "sigma": 0.90952074,
    },
    (7, 3, 49999, 1): {
        "window": (119, 88, 180, 163),
        "flip": True,
        "order": [3, 0, 2, 1],
        "factor": [0.737228917, 0.493238739, 1.40045087, 0.1907105],
        "gray": False,
        "sigma": 0.998460839,
    },
    (123456789, 799, 1281166, 0): {
        "window": (130, 174, 174, 223),
        "flip": False,
        "order": [0, 1, 3, 2],
        "factor": [1.1492517, 1.13627053, 1.77474817, 0.0656008064],
        "gray": False,
        "sigma": 0.0,
    },
}


@pytest.mark.parametrize("address", GOLDEN)
def test_golden_draws_of_simclr(address):
    seed, epoch, sample, view = address
    p = draw(build_recipe(AugmentConfig()), 1, seed=seed, epoch=epoch, first=sample)[0, view]
    assert described(p) == GOLDEN[address]
