"""What is drawn for a view: crop window, flip, rotation, jitter, gray, blur, solarize, sobel, noise, cutout.

`pipelines.draw` draws it, as a pure function of `(seed, epoch, sample, view)`, the recipe and the image's size. Every
loader applies the same parameters, and a restarted or differently sliced run draws the same ones.

Crop windows follow torchvision's `RandomResizedCrop.get_params`: up to ten attempts at an area and an aspect, then a
central window of the nearest allowed aspect. They are whole pixels of the stored image.

Legend: N samples, V views.
"""

from __future__ import annotations

from dataclasses import fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipelines.recipe import Recipe, ViewRecipe

NUM_ATTEMPTS = 10  # torchvision's
NUM_JITTER_OPS = 4
BRIGHTNESS, CONTRAST, SATURATION, HUE, NO_OP = 0, 1, 2, 3, -1

VIEW_PARAMS = np.dtype(
    [
        ("top", np.int32),  # the window, in pixels of the stored image
        ("left", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        (
            "jitter_order",
            np.int32,
            (NUM_JITTER_OPS,),
        ),  # BRIGHTNESS … HUE in the order of application, or NO_OP
        ("jitter_factor", np.float32, (NUM_JITTER_OPS,)),  # indexed by the operation; the hue's is its shift
        ("blur_sigma", np.float32),  # pixels of the view; 0: no blur
        ("solarize_threshold", np.float32),  # on [0, 1]; infinite: no solarization
        ("noise_std", np.float32),  # on [0, 1]; 0: no noise
        ("noise_key", np.uint64),  # of the noise's own numbers: `rng.bits(noise_key, (y · size + x) · 3 + channel)`
        ("cutout_top", np.int32),  # the filled rectangle, clipped to the view; of height 0: none
        ("cutout_left", np.int32),
        ("cutout_height", np.int32),
        ("cutout_width", np.int32),
        ("quarter_turns", np.int32),  # counter-clockwise, 0 to 3
        ("flip", np.bool_),
        ("gray", np.bool_),
        ("sobel", np.bool_),
    ],
    align=True,
)
"""Parameters of one view. Arrays of it are [N, V]."""

ViewParams = NDArray[np.void]
FloatArray = NDArray[np.float64]


class Draw(IntEnum):
    """The number of each draw within a view. Fixed for ever: a change changes every view of every run."""

    CROP_AREA = 0  # and the following NUM_ATTEMPTS − 1
    CROP_ASPECT = 16  # likewise
    CROP_TOP = 32
    CROP_LEFT = 33
    FLIP = 34
    JITTER = 35
    JITTER_FACTOR = 36  # and the following three
    JITTER_ORDER = 40  # likewise
    GRAY = 44
    BLUR = 45
    BLUR_SIGMA = 46
    SOLARIZE = 47
    ROTATE = 48
    QUARTER_TURNS = 49
    SOBEL = 50
    NOISE = 51
    NOISE_STD = 52
    NOISE_KEY = 53
    CUTOUT = 54
    CUTOUT_Y = 55
    CUTOUT_X = 56


CROPS = ("random_resized", "center", "whole")
PROBABILITIES = tuple(field.name for field in fields(ViewRecipe) if field.name.endswith("_prob"))

SHARED_CROP = 0x736861726564  # "shared": in the place of a view's number, the window that views have in common


RECIPE_TABLE = np.dtype(
    [
        ("size", np.int64),
        ("crop", np.int64),
        ("shared_crop", np.bool_),
        ("crop_area", np.float64, (2,)),
        ("log_aspect", np.float64, (2,)),
        ("aspect", np.float64, (2,)),
        ("jitter_low", np.float64, (NUM_JITTER_OPS,)),
        ("jitter_high", np.float64, (NUM_JITTER_OPS,)),
        ("has_op", np.uint8, (NUM_JITTER_OPS,)),
        ("blur_sigma", np.float64, (2,)),
        ("solarize_threshold", np.float64),
        ("noise_std", np.float64, (2,)),
        ("cutout_side", np.int64),
        *((name, np.float64) for name in PROBABILITIES),
    ],
    align=True,
)
"""A view's recipe as the compiled code reads it. Arrays of it are [V]."""


def recipe_table(recipe: Recipe) -> NDArray[np.void]:
    """The recipe for compiled code, `RECIPE_TABLE` [V]."""
    table = np.zeros(len(recipe.views), RECIPE_TABLE)
    for row, view in zip(table, recipe.views, strict=True):
        strength = np.array([view.brightness, view.contrast, view.saturation, view.hue])
        center = np.array([1.0, 1.0, 1.0, 0.0])
        low = center - strength
        low[:HUE] = np.maximum(low[:HUE], 0.0)
        row["size"], row["crop"], row["shared_crop"] = view.size, CROPS.index(view.crop), view.shared_crop
        row["crop_area"], row["aspect"], row["log_aspect"] = view.crop_area, view.crop_aspect, np.log(view.crop_aspect)
        row["jitter_low"], row["jitter_high"], row["has_op"] = low, center + strength, strength > 0.0
        row["blur_sigma"], row["solarize_threshold"] = view.blur_sigma, view.solarize_threshold
        row["noise_std"], row["cutout_side"] = view.noise_std, max(1, round(view.cutout_side * view.size))
        for name in PROBABILITIES:
            row[name] = getattr(view, name)
    return table
