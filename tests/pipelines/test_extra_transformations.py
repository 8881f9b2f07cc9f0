"""`augment.extra_transformations`: added to every view of a recipe, each drawn by itself, at the rates of table 3."""

import dataclasses

import numpy as np
import pytest

from pipelines.augment import AugmentConfig, build_recipe
from tests.pipelines.draws import assert_probability, draw


@pytest.mark.parametrize("recipe", ["simclr", "dino"])
def test_every_view_gets_them_and_keeps_all_else(recipe):
    plain = build_recipe(AugmentConfig(recipe=recipe, size=32))
    more = build_recipe(AugmentConfig(recipe=recipe, size=32, extra_transformations=("rotate", "sobel")))
    for before, after in zip(plain.views, more.views, strict=True):
        assert after == dataclasses.replace(before, rotate_prob=0.75, sobel_prob=0.5)
    ours, theirs = draw(plain, 200), draw(more, 200)
    changed = {name for name in ours.dtype.names if (ours[name] != theirs[name]).any()}
    assert changed == {"quarter_turns", "sobel"}


def test_they_are_drawn_independently_of_one_another_and_of_the_other_view():
    names = ("rotate", "noise", "sobel")
    params = draw(build_recipe(AugmentConfig(size=32, extra_transformations=names)))
    first, second = params[:, 0], params[:, 1]
    for turns in range(4):
        assert_probability(first["quarter_turns"] == turns, 0.25)
    assert_probability(first["noise_std"] > 0, 0.5)
    assert_probability(first["sobel"], 0.5)
    assert_probability(first["sobel"] & (first["noise_std"] > 0), 0.25)
    assert_probability(first["sobel"] == second["sobel"], 0.5)
    assert np.corrcoef(first["quarter_turns"], second["quarter_turns"])[0, 1] == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_transformations": ("noise", "noise")}, "must name each once"),
        (
            {"recipe": "one_branch", "extra_transformations": ("noise",)},
            "name them in `augment.branch_transformations`",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(size=32, **options)
