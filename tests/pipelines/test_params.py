"""View parameters: pure in (seed, epoch, sample, view), and distributed as the papers say."""

import numpy as np
import pytest

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.draw import draw_views
from pipelines.draw_reference import draw_views_reference
from pipelines.order import epoch_order, rank_rows
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION, VIEW_PARAMS
from pipelines.recipe import Recipe, ViewRecipe

NUM = 40_000


def draw(recipe, samples, *, seed=0, epoch=0, width=500, height=375):
    num = len(samples)
    return draw_views(recipe, seed, epoch, samples, np.full(num, width, np.int32), np.full(num, height, np.int32))


@pytest.fixture(scope="module")
def simclr():
    return draw(build_recipe(AugmentConfig()), np.arange(NUM, dtype=np.int64))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_draw_what_one_process_draws(world_size):
    recipe = build_recipe(AugmentConfig())
    order = epoch_order(3, 7, 100)
    whole = draw(recipe, order[:64], seed=3, epoch=7)
    parts = [
        draw(recipe, order[rank_rows(0, 64, 100, rank, world_size)], seed=3, epoch=7) for rank in range(world_size)
    ]
    assert (np.concatenate(parts) == whole).all()


def test_views_differ_by_seed_epoch_sample_and_view(simclr):
    recipe = build_recipe(AugmentConfig())
    one = np.array([5], np.int64)
    base = draw(recipe, one)
    assert (base == simclr[5:6]).all()
    assert base[0, 0] != base[0, 1]
    for other in (draw(recipe, one, seed=1), draw(recipe, one, epoch=1), draw(recipe, one + 1)):
        assert base[0, 0] != other[0, 0]


def test_windows_lie_inside_the_image_with_the_published_areas_and_aspects(simclr):
    v = simclr[:, 0]
    assert (v["top"] >= 0).all()
    assert (v["left"] >= 0).all()
    assert (v["top"] + v["height"] <= 375).all()
    assert (v["left"] + v["width"] <= 500).all()
    share = v["width"].astype(float) * v["height"] / (500 * 375)
    assert 0.078 < share.min() < 0.085
    assert 0.95 < share.max() <= 1.0
    aspect = v["width"] / v["height"]
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35


def test_windows_are_distributed_as_torchvisions(simclr):
    # Quantiles of area and aspect against 10,000 draws of torchvision's RandomResizedCrop.get_params.
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    transform, image = RandomResizedCrop(224, scale=(0.08, 1.0)), torch.empty(3, 375, 500)
    theirs = [transform.make_params([image]) for _ in range(10_000)]
    area = np.array([p["height"] * p["width"] for p in theirs], float)
    aspect = np.array([p["width"] / p["height"] for p in theirs])
    ours = simclr[:, 0]
    quantiles = np.linspace(0.05, 0.95, 10)
    our_area = ours["width"].astype(float) * ours["height"]
    np.testing.assert_allclose(np.quantile(our_area, quantiles), np.quantile(area, quantiles), rtol=0.05)
    np.testing.assert_allclose(
        np.quantile(ours["width"] / ours["height"], quantiles), np.quantile(aspect, quantiles), rtol=0.02
    )


def test_positions_are_uniform(simclr):
    v = simclr[:, 0]
    free = v["left"] / np.maximum(500 - v["width"], 1)
    roomy = (500 - v["width"]) > 100
    assert abs(free[roomy].mean() - 0.5) < 0.01


def test_probabilities_and_factors_are_simclrs(simclr):
    v = simclr.reshape(-1)
    error = 5 * 0.5 / np.sqrt(v.size)
    jittered = v["jitter_order"][:, 0] != NO_OP
    assert abs(v["flip"].mean() - 0.5) < error
    assert abs(jittered.mean() - 0.8) < error
    assert abs(v["gray"].mean() - 0.2) < error
    assert abs((v["blur_sigma"] > 0).mean() - 0.5) < error
    assert np.isinf(v["solarize_threshold"]).all()
    blurred = v["blur_sigma"][v["blur_sigma"] > 0]
    assert 0.1 <= blurred.min() < 0.11
    assert 1.99 < blurred.max() <= 2.0
    for op, low, high in (
        (BRIGHTNESS, 0.2, 1.8),
        (CONTRAST, 0.2, 1.8),
        (SATURATION, 0.2, 1.8),
        (HUE, -0.2, 0.2),
    ):
        factor = v["jitter_factor"][:, op]
        assert low <= factor.min() < low + 0.001 * (high - low)
        assert high - 0.001 * (high - low) < factor.max() <= high
        assert abs(factor.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * v.size)


def test_all_orders_of_the_jitter_are_equally_likely(simclr):
    v = simclr.reshape(-1)
    orders = v["jitter_order"][v["jitter_order"][:, 0] != NO_OP]
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    expected = len(orders) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 23 + 5 * np.sqrt(46)


def test_strength_scales_the_jitter():
    weak = draw(build_recipe(AugmentConfig(color_strength=0.5, blur_prob=0.0)), np.arange(5000, dtype=np.int64))
    assert 0.6 <= weak["jitter_factor"][..., BRIGHTNESS].min() < 0.61
    assert 0.099 < weak["jitter_factor"][..., HUE].max() <= 0.1
    assert (weak["blur_sigma"] == 0).all()


def test_an_operation_without_strength_is_left_out():
    recipe = Recipe(views=(ViewRecipe(size=32, jitter_prob=1.0, brightness=0.4, hue=0.1),))
    orders = draw(recipe, np.arange(1000, dtype=np.int64))["jitter_order"][:, 0]
    assert set(orders.reshape(-1).tolist()) == {NO_OP, BRIGHTNESS, HUE}


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 10), (3, 9000), (65535, 1)])
def test_extreme_images_get_a_window_of_at_least_one_pixel(width, height):
    v = draw(build_recipe(AugmentConfig()), np.arange(500, dtype=np.int64), width=width, height=height)
    assert (v["width"] >= 1).all()
    assert (v["height"] >= 1).all()
    assert (v["left"] >= 0).all()
    assert (v["left"] + v["width"] <= width).all()
    assert (v["top"] + v["height"] <= height).all()


def test_center_takes_the_largest_central_square():
    v = draw(center_recipe(AugmentConfig(size=32)), np.arange(3, dtype=np.int64))[0, 0]
    assert (v["left"], v["top"], v["width"], v["height"]) == (62, 0, 375, 375)
    assert not v["flip"]
    assert (v["jitter_order"] == NO_OP).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop_area", (0.5, 0.2), "`crop_area` must be a rising range"),
        ("crop_area", (0.0, 1.0), "`crop_area` must be a rising range"),
        ("flip_prob", 1.5, "`flip_prob` must be a probability"),
        ("color_strength", 3.0, "`augment.color_strength` must be in"),
        ("size", 0, "`size` of a view must be at least 1"),
    ],
)
def test_a_bad_recipe_is_refused_by_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value})


@pytest.mark.parametrize(("size", "kernel"), [(224, 23), (96, 9), (32, 3), (10, 1)])
def test_the_blur_kernel_is_a_tenth_of_the_side_made_odd(size, kernel):
    assert ViewRecipe(size=size).blur_kernel == kernel


RECIPES = {
    "simclr": {},
    "cifar": {"size": 32, "color_strength": 0.5, "blur_prob": 0.0},
    "strong": {"color_strength": 2.5, "crop_area": (0.5, 0.6)},
    "byol": {"recipe": "byol"},
    "dino": {"recipe": "dino"},
    "study": {
        "recipe": "one_branch",
        "branch_transformations": ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate"),
    },
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("width", "height"), [(500, 375), (31, 500), (20_000, 300), (1, 1), (3, 2)])
def test_the_compiled_draws_are_the_definition_bit_by_bit(name, width, height):
    recipe = build_recipe(AugmentConfig(**RECIPES[name]))
    samples = np.arange(3, 20_000, 7)
    sizes = np.full(len(samples), width, np.int32), np.full(len(samples), height, np.int32)
    compiled = draw_views(recipe, 2**63 - 5, 41, samples, *sizes)
    defined = draw_views_reference(recipe, 2**63 - 5, 41, samples, *sizes)
    for field in VIEW_PARAMS.names:
        np.testing.assert_array_equal(compiled[field], defined[field], err_msg=field)


def test_a_centre_crop_is_compiled_as_defined():
    recipe = center_recipe(AugmentConfig())
    sizes = np.array([500, 333, 7], np.int32), np.array([375, 500, 8], np.int32)
    compiled = draw_views(recipe, 0, 0, np.arange(3), *sizes)
    assert (compiled == draw_views_reference(recipe, 0, 0, np.arange(3), *sizes)).all()
    assert compiled["top"][:, 0].tolist() == [0, 83, 0]
    assert compiled["left"][:, 0].tolist() == [62, 0, 0]
