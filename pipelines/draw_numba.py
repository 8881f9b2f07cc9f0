"""Draw the parameters of one sample's views, compiled: bit-equal to `pipelines.draw_reference`.

A decoding thread draws what it is about to decode (0.5 µs an image for SimCLR), so that no batch waits for the thread
that hands it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from native.compiled import source_hash
from pipelines.params import CROPS, NO_OP, NUM_ATTEMPTS, NUM_JITTER_OPS, SHARED_CROP, Draw
from pipelines.rng import GAMMA, MULTIPLIER_1, MULTIPLIER_2

SOURCES = ("pipelines.draw_numba", "pipelines.params", "pipelines.rng")
"""The modules whose code is compiled into `draw`."""

_RANDOM, _CENTER = CROPS.index("random_resized"), CROPS.index("center")
# Enumerations are no constants to Numba where they are used as numbers.
_AREA, _ASPECT, _TOP, _LEFT = int(Draw.CROP_AREA), int(Draw.CROP_ASPECT), int(Draw.CROP_TOP), int(Draw.CROP_LEFT)
_FLIP, _GRAY, _SOBEL = int(Draw.FLIP), int(Draw.GRAY), int(Draw.SOBEL)
_JITTER, _FACTOR, _ORDER = int(Draw.JITTER), int(Draw.JITTER_FACTOR), int(Draw.JITTER_ORDER)
_BLUR, _BLUR_SIGMA, _SOLARIZE = int(Draw.BLUR), int(Draw.BLUR_SIGMA), int(Draw.SOLARIZE)
_ROTATE, _QUARTER_TURNS = int(Draw.ROTATE), int(Draw.QUARTER_TURNS)
_NOISE, _NOISE_STD, _NOISE_KEY = int(Draw.NOISE), int(Draw.NOISE_STD), int(Draw.NOISE_KEY)
_CUTOUT, _CUTOUT_Y, _CUTOUT_X = int(Draw.CUTOUT), int(Draw.CUTOUT_Y), int(Draw.CUTOUT_X)


@cache
def draw_kernel() -> Callable[..., None]:
    """The compiled loop of `pipelines.draw.draw_views`."""
    version = source_hash(*SOURCES)

    @njit(nogil=True, cache=True)
    def run(table, epoch_key, samples, widths, heights, out):
        _ = version  # in the closure, and so in the key of Numba's cache
        for i in range(samples.size):
            draw(table, epoch_key, samples[i], widths[i], heights[i], out[i])

    return run  # type: ignore[no-any-return]


@njit(nogil=True)
def draw(table, epoch_key, sample, width, height, out):
    """Draw one sample's views.

    Args:
        table: `RECIPE_TABLE` [V].
        epoch_key: uint64, `rng.key_of(seed, epoch)`.
        sample: row of the `.beton`.
        width: of the stored image, pixels.
        height: likewise.
        out: `VIEW_PARAMS` [V]; written.
    """
    key_of_sample = _absorb(epoch_key, np.uint64(sample))
    for v in range(table.size):
        recipe, view = table[v], out[v]
        key = _absorb(key_of_sample, np.uint64(v))
        if recipe.shared_crop:
            _random_window(recipe, _absorb(key_of_sample, np.uint64(SHARED_CROP)), width, height, view)
            top, left = view.top, view.left
            _window(recipe, key, view.width, view.height, view)
            view.top += top
            view.left += left
        else:
            _window(recipe, key, width, height, view)
        view.flip = _uniform(key, _FLIP) < recipe.flip_prob
        _jitter(recipe, key, view)
        view.gray = _uniform(key, _GRAY) < recipe.gray_prob
        blurred = _uniform(key, _BLUR) < recipe.blur_prob
        view.blur_sigma = _between(_uniform(key, _BLUR_SIGMA), recipe.blur_sigma) if blurred else 0.0
        solarized = _uniform(key, _SOLARIZE) < recipe.solarize_prob
        view.solarize_threshold = recipe.solarize_threshold if solarized else np.inf
        turned = _uniform(key, _ROTATE) < recipe.rotate_prob
        view.quarter_turns = 1 + int(np.floor(3.0 * _uniform(key, _QUARTER_TURNS))) if turned else 0
        view.sobel = _uniform(key, _SOBEL) < recipe.sobel_prob
        noisy = _uniform(key, _NOISE) < recipe.noise_prob
        view.noise_std = _between(_uniform(key, _NOISE_STD), recipe.noise_std) if noisy else 0.0
        view.noise_key = _bits(key, _NOISE_KEY)
        _cutout(recipe, key, view)


@njit(nogil=True)
def _window(recipe, key, width, height, view):
    if recipe.crop == _RANDOM:
        _random_window(recipe, key, width, height, view)
        return
    smaller = min(width, height)
    view.width, view.height = (smaller, smaller) if recipe.crop == _CENTER else (width, height)
    view.top, view.left = (height - view.height) // 2, (width - view.width) // 2


@njit(nogil=True)
def _random_window(recipe, key, width, height, view):
    for attempt in range(NUM_ATTEMPTS):
        share = _between(_uniform(key, _AREA + attempt), recipe.crop_area)
        log_aspect = _between(_uniform(key, _ASPECT + attempt), recipe.log_aspect)
        aspect = np.float64(np.float32(np.exp(log_aspect)))
        area = share * (np.float64(width) * np.float64(height))
        w, h = int(np.rint(np.sqrt(area * aspect))), int(np.rint(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            view.width, view.height = w, h
            view.top = int(np.floor(_uniform(key, _TOP) * np.float64(height - h + 1)))
            view.left = int(np.floor(_uniform(key, _LEFT) * np.float64(width - w + 1)))
            return
    w = max(min(width, int(np.rint(height * recipe.aspect[1]))), 1)
    h = max(min(height, int(np.rint(width / recipe.aspect[0]))), 1)
    view.width, view.height, view.top, view.left = w, h, (height - h) // 2, (width - w) // 2


@njit(nogil=True)
def _jitter(recipe, key, view):
    jittered = _uniform(key, _JITTER) < recipe.jitter_prob
    for op in range(NUM_JITTER_OPS):
        low, high = recipe.jitter_low[op], recipe.jitter_high[op]
        view.jitter_factor[op] = low + _uniform(key, _FACTOR + op) * (high - low)
        rank = 0  # of this operation among all, by its own random number
        mine = _uniform(key, _ORDER + op)
        for other in range(NUM_JITTER_OPS):
            theirs = _uniform(key, _ORDER + other)
            rank += theirs < mine or (theirs == mine and other < op)
        view.jitter_order[rank] = op if jittered and recipe.has_op[op] else NO_OP


@njit(nogil=True)
def _cutout(recipe, key, view):
    view.cutout_top = view.cutout_left = view.cutout_height = view.cutout_width = 0
    if _uniform(key, _CUTOUT) < recipe.cutout_prob:
        size, side = recipe.size, recipe.cutout_side
        top = int(np.floor(_uniform(key, _CUTOUT_Y) * size)) - side // 2
        left = int(np.floor(_uniform(key, _CUTOUT_X) * size)) - side // 2
        view.cutout_top, view.cutout_left = max(top, 0), max(left, 0)
        view.cutout_height = min(top + side, size) - view.cutout_top
        view.cutout_width = min(left + side, size) - view.cutout_left


@njit(nogil=True)
def _between(u, bounds):
    return bounds[0] + u * (bounds[1] - bounds[0])


@njit(nogil=True)
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True)
def _absorb(key, word):
    return _mix((key ^ word) + np.uint64(GAMMA))


@njit(nogil=True)
def _bits(key, draw):
    return _mix(key + np.uint64(draw + 1) * np.uint64(GAMMA))


@njit(nogil=True)
def _uniform(key, draw):
    return np.float64(_bits(key, draw) >> np.uint64(11)) * 2.0**-53
