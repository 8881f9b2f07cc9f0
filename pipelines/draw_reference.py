"""Draw the parameters of views with NumPy: the definition that the compiled `pipelines.draw.draw_views` is held to.

Legend: N samples, V views.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.params import (
    HUE,
    NO_OP,
    NUM_ATTEMPTS,
    NUM_JITTER_OPS,
    SHARED_CROP,
    VIEW_PARAMS,
    Draw,
    FloatArray,
    ViewParams,
)
from pipelines.recipe import Recipe, ViewRecipe
from pipelines.rng import as_words, bits, key_of, uniform


def draw_views_reference(
    recipe: Recipe,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> ViewParams:
    """Draw the parameters of all views of some samples: arguments and result are `pipelines.draw.draw_views`'s."""
    params = np.zeros((len(samples), len(recipe.views)), VIEW_PARAMS)
    for v, view in enumerate(recipe.views):
        key = key_of(seed, epoch, samples, v)
        if view.shared_crop:
            shared = np.zeros(len(samples), VIEW_PARAMS)
            _random_window(shared, view, key_of(seed, epoch, samples, SHARED_CROP), widths, heights)
            _draw_view(params[:, v], view, key, shared["width"], shared["height"])
            params["top"][:, v] += shared["top"]
            params["left"][:, v] += shared["left"]
        else:
            _draw_view(params[:, v], view, key, widths, heights)
    return params


def _draw_view(
    out: ViewParams,
    view: ViewRecipe,
    key: NDArray[np.uint64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> None:
    if view.crop == "random_resized":
        _random_window(out, view, key, widths, heights)
    else:
        _fixed_window(out, view, widths, heights)
    out["flip"] = uniform(key, Draw.FLIP) < view.flip_prob
    _draw_jitter(out, view, key)
    out["gray"] = uniform(key, Draw.GRAY) < view.gray_prob
    sigma = _between(uniform(key, Draw.BLUR_SIGMA), view.blur_sigma)
    out["blur_sigma"] = np.where(uniform(key, Draw.BLUR) < view.blur_prob, sigma, 0.0)
    solarized = uniform(key, Draw.SOLARIZE) < view.solarize_prob
    out["solarize_threshold"] = np.where(solarized, view.solarize_threshold, np.inf)
    turned = uniform(key, Draw.ROTATE) < view.rotate_prob
    out["quarter_turns"] = np.where(turned, 1 + np.floor(3 * uniform(key, Draw.QUARTER_TURNS)), 0)
    out["sobel"] = uniform(key, Draw.SOBEL) < view.sobel_prob
    noise_std = _between(uniform(key, Draw.NOISE_STD), view.noise_std)
    out["noise_std"] = np.where(uniform(key, Draw.NOISE) < view.noise_prob, noise_std, 0.0)
    out["noise_key"] = bits(key, as_words(int(Draw.NOISE_KEY)))
    _draw_cutout(out, view, key)


def _random_window(
    out: ViewParams,
    view: ViewRecipe,
    key: NDArray[np.uint64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> None:
    key_N1 = key[:, None]
    attempts = np.arange(NUM_ATTEMPTS, dtype=np.uint64)
    share = _between(uniform(key_N1, attempts + np.uint64(Draw.CROP_AREA)), view.crop_area)
    log_aspect = _between(uniform(key_N1, attempts + np.uint64(Draw.CROP_ASPECT)), np.log(view.crop_aspect))
    # Rounded to float32 so that a last-bit difference between machines' exp() cannot move a window.
    aspect = np.exp(log_aspect).astype(np.float32).astype(np.float64)
    area = share * (widths.astype(np.float64) * heights)[:, None]
    width_NA = np.rint(np.sqrt(area * aspect)).astype(np.int32)
    height_NA = np.rint(np.sqrt(area / aspect)).astype(np.int32)
    fits = (width_NA > 0) & (width_NA <= widths[:, None]) & (height_NA > 0) & (height_NA <= heights[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(out))
    fallback_width, fallback_height = _fallback_window(view.crop_aspect, widths, heights)
    found = fits[rows, first]
    width = np.where(found, width_NA[rows, first], fallback_width)
    height = np.where(found, height_NA[rows, first], fallback_height)
    top = np.floor(uniform(key, Draw.CROP_TOP) * (heights - height + 1)).astype(np.int32)
    left = np.floor(uniform(key, Draw.CROP_LEFT) * (widths - width + 1)).astype(np.int32)
    out["width"], out["height"] = width, height
    out["top"] = np.where(found, top, (heights - height) // 2)
    out["left"] = np.where(found, left, (widths - width) // 2)


def _fallback_window(
    aspect: tuple[float, float], widths: NDArray[np.int32], heights: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The largest window whose aspect is within the range; at least one pixel on an extreme panorama."""
    width = np.minimum(widths, np.rint(heights * aspect[1])).astype(np.int32)
    height = np.minimum(heights, np.rint(widths / aspect[0])).astype(np.int32)
    return np.maximum(width, 1), np.maximum(height, 1)


def _fixed_window(out: ViewParams, view: ViewRecipe, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> None:
    smaller = np.minimum(widths, heights)
    out["width"], out["height"] = (smaller, smaller) if view.crop == "center" else (widths, heights)
    out["top"], out["left"] = (heights - out["height"]) // 2, (widths - out["width"]) // 2


def _draw_jitter(out: ViewParams, view: ViewRecipe, key: NDArray[np.uint64]) -> None:
    strength = (view.brightness, view.contrast, view.saturation, view.hue)
    ops = np.arange(NUM_JITTER_OPS, dtype=np.uint64)
    u = uniform(key[:, None], ops + np.uint64(Draw.JITTER_FACTOR))
    low = [max(0.0, 1.0 - s) for s in strength[:HUE]] + [-strength[HUE]]
    high = [1.0 + s for s in strength[:HUE]] + [strength[HUE]]
    out["jitter_factor"] = _between(u, (np.array(low), np.array(high)))
    order = np.argsort(uniform(key[:, None], ops + np.uint64(Draw.JITTER_ORDER)), axis=1, kind="stable")
    applied = (uniform(key, Draw.JITTER) < view.jitter_prob)[:, None] & (np.array(strength) > 0.0)[order]
    out["jitter_order"] = np.where(applied, order, NO_OP)


def _draw_cutout(out: ViewParams, view: ViewRecipe, key: NDArray[np.uint64]) -> None:
    """A square around a uniform pixel, clipped to the view (DeVries and Taylor 2017)."""
    side = max(1, round(view.cutout_side * view.size))
    chosen = uniform(key, Draw.CUTOUT) < view.cutout_prob
    for name, extent, draw in (
        ("cutout_top", "cutout_height", Draw.CUTOUT_Y),
        ("cutout_left", "cutout_width", Draw.CUTOUT_X),
    ):
        begin = np.floor(uniform(key, draw) * view.size).astype(np.int32) - side // 2
        low, high = np.maximum(begin, 0), np.minimum(begin + side, view.size)
        out[name], out[extent] = np.where(chosen, low, 0), np.where(chosen, high - low, 0)


def _between(u: FloatArray, bounds: tuple[float, float] | tuple[FloatArray, FloatArray] | FloatArray) -> FloatArray:
    """Uniform numbers of [0, 1) moved to [low, high)."""
    low, high = bounds
    moved: FloatArray = low + u * (high - low)
    return moved
