"""The recipes against their papers, and the transformations of a single branch."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.params import VIEW_PARAMS
from pipelines.photometric import reference
from pipelines.recipe import ViewRecipe
from tests.pipelines.draws import (
    NUM,
    PHOTO,
    assert_probability,
    one_branch,
)

WINDOW = ("top", "left", "height", "width")


def jitter_of(view):
    return view.brightness, view.contrast, view.saturation, pytest.approx(view.hue)


def test_simclr_is_the_papers_appendix_a():
    first, second = build_recipe(AugmentConfig(recipe="simclr")).views
    assert first == second
    assert (first.size, first.crop, first.crop_area) == (224, "random_resized", (0.08, 1.0))
    assert first.crop_aspect == (3 / 4, 4 / 3)
    assert jitter_of(first) == (0.8, 0.8, 0.8, 0.2)
    assert (first.flip_prob, first.jitter_prob, first.gray_prob, first.blur_prob) == (0.5, 0.8, 0.2, 0.5)
    assert (first.blur_sigma, first.blur_kernel) == ((0.1, 2.0), 23)
    assert first.solarize_prob == first.rotate_prob == first.sobel_prob == first.noise_prob == first.cutout_prob == 0


def test_simclr_on_cifar_is_the_papers_appendix_b9():
    first, second = build_recipe(AugmentConfig(size=32, color_strength=0.5, blur_prob=0.0)).views
    assert first == second
    assert jitter_of(first) == (0.4, 0.4, 0.4, 0.1)
    assert (first.size, first.blur_prob) == (32, 0.0)


def test_moco_v2_is_its_main_moco():
    # transforms.RandomResizedCrop(224, scale=(0.2, 1.0)); ColorJitter(0.4, 0.4, 0.4, 0.1), p=0.8;
    # RandomGrayscale(p=0.2); GaussianBlur([0.1, 2.0]), p=0.5; RandomHorizontalFlip()
    first, second = build_recipe(AugmentConfig(recipe="moco_v2")).views
    assert first == second
    assert (first.size, first.crop_area, first.crop_aspect) == (224, (0.2, 1.0), (3 / 4, 4 / 3))
    assert jitter_of(first) == (0.4, 0.4, 0.4, 0.1)
    assert (first.flip_prob, first.jitter_prob, first.gray_prob, first.blur_prob) == (0.5, 0.8, 0.2, 0.5)
    assert (first.blur_sigma, first.solarize_prob) == ((0.1, 2.0), 0.0)


BYOL_TABLE_6 = {  # parameter: T, T′
    "flip_prob": (0.5, 0.5),
    "jitter_prob": (0.8, 0.8),
    "brightness": (0.4, 0.4),
    "contrast": (0.4, 0.4),
    "saturation": (0.2, 0.2),
    "hue": (0.1, 0.1),
    "gray_prob": (0.2, 0.2),
    "blur_prob": (1.0, 0.1),
    "solarize_prob": (0.0, 0.2),
}


@pytest.mark.parametrize("name", BYOL_TABLE_6)
def test_byol_is_table_6(name):
    views = build_recipe(AugmentConfig(recipe="byol")).views
    assert tuple(getattr(view, name) for view in views) == pytest.approx(BYOL_TABLE_6[name])


def test_byol_crops_as_simclr_and_solarizes_at_one_half():
    for view in build_recipe(AugmentConfig(recipe="byol")).views:
        assert (view.crop_area, view.crop_aspect, view.solarize_threshold) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)


MAIN_DINO = {  # parameter: global 1, global 2, local
    "size": (224, 224, 96),
    "crop_area": ((0.4, 1.0), (0.4, 1.0), (0.05, 0.4)),
    "flip_prob": (0.5, 0.5, 0.5),
    "jitter_prob": (0.8, 0.8, 0.8),
    "brightness": (0.4, 0.4, 0.4),
    "contrast": (0.4, 0.4, 0.4),
    "saturation": (0.2, 0.2, 0.2),
    "hue": (0.1, 0.1, 0.1),
    "gray_prob": (0.2, 0.2, 0.2),
    "blur_prob": (1.0, 0.1, 0.5),
    "blur_sigma": ((0.1, 2.0), (0.1, 2.0), (0.1, 2.0)),
    "solarize_prob": (0.0, 0.2, 0.0),
}


@pytest.mark.parametrize("name", MAIN_DINO)
def test_dino_is_main_dino(name):
    one, two, *local = (getattr(view, name) for view in build_recipe(AugmentConfig(recipe="dino")).views)
    for found, published in zip((one, two, local[0]), MAIN_DINO[name], strict=True):
        assert found == pytest.approx(published)
    assert local == [local[0]] * 8


@pytest.mark.parametrize("num_local", [0, 1, 6])
def test_dinos_small_views_are_as_many_and_as_large_as_asked(num_local):
    config = AugmentConfig(recipe="dino", size=160, local_views=num_local, local_size=64, local_crop_area=(0.1, 0.3))
    views = build_recipe(config).views
    assert [view.size for view in views] == [160, 160] + [64] * num_local
    assert [view.crop_area for view in views] == [(0.4, 1.0)] * 2 + [(0.1, 0.3)] * num_local


def test_supervised_is_crop_and_flip():
    (view,) = build_recipe(AugmentConfig(recipe="supervised", size=160)).views
    assert view == ViewRecipe(size=160, crop_area=(0.08, 1.0), flip_prob=0.5)


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "byol", "dino", "supervised", "one_branch"])
def test_options_reach_every_view(name):
    config = AugmentConfig(
        recipe=name, interpolation="bicubic", flip_prob=0.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3)
    )
    recipe = build_recipe(config)
    assert {view.interpolation for view in recipe.views} == {"bicubic"}
    assert {view.flip_prob for view in recipe.views} == {0.0}
    assert (recipe.mean, recipe.std) == ((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    assert center_recipe(config).mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "dino", "local_views": -1}, "`augment.local_views` must be 0 or more"),
        ({"local_views": 2}, "`augment.local_views` needs `augment.recipe` dino, got simclr"),
        ({"recipe": "one_branch", "branch_transformations": ("crop", "crop")}, "must name each once"),
        ({"recipe": "dino", "local_crop_area": (0.4, 0.05)}, "`crop_area` must be a rising range"),
        ({"recipe": "dino", "local_size": 0}, "`size` of a view must be at least 1"),
        ({"blur_prob": 1.1}, "`blur_prob` must be a probability"),
        ({"std": (0.2, 0.0, 0.2)}, "`std` must be positive"),
        ({"recipe": "one_branch", "size": 1, "branch_transformations": ("sobel",)}, "`sobel_prob` must be 0 for"),
    ],
)
def test_bad_options_are_refused_by_field(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**options)


# One transformation on one branch.

CHANGED = {  # what a view's parameters may differ in from an untouched one's
    "crop": {*WINDOW, "flip"},
    "cutout": {"cutout_top", "cutout_left", "cutout_height", "cutout_width"},
    "color": {"jitter_order", "gray"},
    "sobel": {"sobel"},
    "noise": {"noise_std"},
    "blur": {"blur_sigma"},
    "rotate": {"quarter_turns"},
}
PROBABILITY = {
    "crop": 1.0,
    "cutout": 1.0,
    "color": 1 - 0.2 * 0.8,
    "sobel": 1.0,
    "noise": 1.0,
    "blur": 0.5,
    "rotate": 0.75,
}
IRRELEVANT = {"noise_key", "jitter_factor"}  # where there is no noise, and no operation


@pytest.mark.parametrize("name", CHANGED)
def test_a_single_transformation_changes_what_it_is_named_for_and_nothing_else(name):
    _, first, second = one_branch(name)
    differ = {field: (first[field] != second[field]).reshape(len(first), -1).any(1) for field in VIEW_PARAMS.names}
    changed = {field for field in differ if differ[field].any()} - IRRELEVANT
    assert changed == CHANGED[name]
    assert_probability(np.any([differ[field] for field in changed], axis=0), PROBABILITY[name])


@pytest.mark.parametrize("name", CHANGED)
def test_the_other_branch_is_the_plain_crop(name):
    recipe, _, second = one_branch(name, num=16)
    crops = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    views = reference.photometric(crops, second, recipe.views[1], recipe, torch.float64)
    assert torch.equal(views, crops.double() / 255)


@pytest.mark.parametrize("names", [("crop", "color"), ("rotate", "cutout", "blur"), ()])
def test_several_transformations_change_what_they_are_named_for(names):
    _, first, second = one_branch(*names)
    changed = {field for field in VIEW_PARAMS.names if (first[field] != second[field]).any()} - IRRELEVANT
    assert changed == set().union(*(CHANGED[name] for name in names))


def test_branches_share_a_crop_as_torchvision_draws_it():
    _, _, second = one_branch("color", num=NUM)
    share = second["width"].astype(float) * second["height"] / (PHOTO[0] * PHOTO[1])
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(224, scale=(0.08, 1.0)), torch.empty(3, PHOTO[1], PHOTO[0])
    theirs = [transform.make_params([image]) for _ in range(10_000)]
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(share, quantiles),
        np.quantile([p["height"] * p["width"] / (PHOTO[0] * PHOTO[1]) for p in theirs], quantiles),
        rtol=0.05,
    )


def test_a_second_crop_lies_within_the_shared_one():
    _, inner, outer = one_branch("crop")
    for begin, extent in (("top", "height"), ("left", "width")):
        assert (inner[begin] >= outer[begin]).all()
        assert (inner[begin] + inner[extent] <= outer[begin] + outer[extent]).all()
    share = (inner["width"] * inner["height"]) / (outer["width"] * outer["height"])
    assert share.min() < 0.1
    assert share.max() > 0.95
