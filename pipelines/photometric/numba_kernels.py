"""The photometric chain of one image on the CPU, compiled by Numba.

The same definition as `pipelines.photometric.reference`, in float32, on three contiguous colour planes that stay in
the cache from the first operation to the last. Loops run over whole planes without branches, so that LLVM vectorises
them. What only the study of single transformations uses is in `pipelines.photometric.numba_study`.

Legend: S the side; planes are float32 [3, S·S] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from native.compiled import source_hash
from native.simd import NUM_LANES, load, multiply_add, splat, store
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from pipelines.photometric.numba_study import rotate_plane, study

SOURCES = (
    "pipelines.photometric.numba_kernels",
    "pipelines.photometric.numba_study",
    "native.simd",
    "pipelines.params",
    "pipelines.rng",
)
"""The modules whose code is compiled into the chain."""

RED_LUMA, GREEN_LUMA, BLUE_LUMA = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
ZERO, ONE, UNIT = np.float32(0.0), np.float32(1.0), np.float32(1 / 255)
FLOAT = 4  # bytes
NEGLIGIBLE = 1e-6  # share of a Gaussian's weight that is left out: 1/4000 of a level


@njit(nogil=True)
def photometric_planes(planes, spare, view, kernel_size, mean, std, out):
    """Rotate → jitter → gray → blur → solarize → sobel → noise → cutout → normalise one image.

    Args:
        planes: float32 [3, S·S] in [0, 1]; overwritten.
        spare: float32 scratch [S·S].
        view: one `VIEW_PARAMS` record.
        kernel_size: of the blur, odd.
        mean: float32 [3].
        std: float32 [3].
        out: float32 [S, S, 3]; written.
    """
    size = out.shape[0]
    red, green, blue = planes[0], planes[1], planes[2]
    if view.quarter_turns:
        for c in range(3):
            rotate_plane(planes[c], size, view.quarter_turns, spare)
    for step in range(4):
        op = view.jitter_order[step]
        if op == BRIGHTNESS:
            _brightness(planes, view.jitter_factor[op])
        elif op == CONTRAST:
            _contrast(planes, view.jitter_factor[op])
        elif op == SATURATION:
            _saturation(planes, view.jitter_factor[op])
        elif op == HUE:
            _hue(planes, view.jitter_factor[op])
    if view.gray:  # one plane from here on, under three names
        _grayscale(red, green, blue)
        green, blue = red, red
    if view.blur_sigma > ZERO and kernel_size > 1:
        weights = _gaussian(view.blur_sigma, kernel_size)
        # Each plane goes into one that is no longer needed.
        if view.gray:
            _blur(red, size, weights, spare)
            red, green, blue = spare, spare, spare
        else:
            _blur(blue, size, weights, spare)
            _blur(green, size, weights, blue)
            _blur(red, size, weights, green)
            red, green, blue = green, blue, spare
    if view.solarize_threshold <= ONE:
        _solarize(red, view.solarize_threshold)
        if not view.gray:
            _solarize(green, view.solarize_threshold)
            _solarize(blue, view.solarize_threshold)
    if view.sobel or view.noise_std > ZERO or view.cutout_height > 0:
        _store(red, green, blue, np.zeros(3, np.float32), np.ones(3, np.float32), out.reshape(-1))
        study(out, view, mean, std, planes[0])
    else:
        _store(red, green, blue, mean, std, out.reshape(-1))


def photometric_batch(
    crops: NDArray[np.uint8],
    params: ViewParams,
    kernel_size: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """The chain over a batch, on the calling thread; other threads may run meanwhile.

    Args:
        crops: uint8 [N, S, S, 3], contiguous.
        params: `VIEW_PARAMS` [N].
        kernel_size: of the blur, odd.
        mean: float32 [3].
        std: float32 [3].
        out: float32 [N, S, S, 3], contiguous; written.
    """
    batch_kernel()(crops, params, kernel_size, mean, std, out)


@cache
def batch_kernel() -> Callable[..., None]:
    """The compiled loop of `photometric_batch`."""
    version = source_hash(*SOURCES)

    @njit(nogil=True, cache=True)
    def run(crops, params, kernel_size, mean, std, out):
        _ = version  # in the closure, and so in the key of Numba's cache
        num_pixels = crops.shape[1] * crops.shape[2]
        planes, spare = np.empty((3, num_pixels), np.float32), np.empty(num_pixels, np.float32)
        for i in range(crops.shape[0]):
            _load_bytes(crops[i].reshape(-1), planes)
            photometric_planes(planes, spare, params[i], kernel_size, mean, std, out[i])

    return run  # type: ignore[no-any-return]


@njit(nogil=True)
def load_words(words, planes):
    """RGBX words, uint32 [≥ S·S], to planes, float32 [≥ 3, S·S]."""
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        word = words[i]
        red[i] = np.float32(np.int32(word & np.uint32(0xFF))) * UNIT
        green[i] = np.float32(np.int32((word >> np.uint32(8)) & np.uint32(0xFF))) * UNIT
        blue[i] = np.float32(np.int32((word >> np.uint32(16)) & np.uint32(0xFF))) * UNIT


@njit(nogil=True)
def _load_bytes(pixels, planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        red[i] = np.float32(pixels[3 * i]) * UNIT
        green[i] = np.float32(pixels[3 * i + 1]) * UNIT
        blue[i] = np.float32(pixels[3 * i + 2]) * UNIT


@njit(nogil=True)
def _store(red, green, blue, mean, std, pixels):
    red_scale, green_scale, blue_scale = ONE / std[0], ONE / std[1], ONE / std[2]
    red_mean, green_mean, blue_mean = mean[0], mean[1], mean[2]
    for i in range(red.size):
        pixels[3 * i] = (red[i] - red_mean) * red_scale
        pixels[3 * i + 1] = (green[i] - green_mean) * green_scale
        pixels[3 * i + 2] = (blue[i] - blue_mean) * blue_scale


@njit(nogil=True)
def _clip(x):
    return min(max(x, ZERO), ONE)


@njit(nogil=True)
def _luma(red, green, blue):
    return RED_LUMA * red + GREEN_LUMA * green + BLUE_LUMA * blue


@njit(nogil=True)
def _brightness(planes, factor):
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _clip(factor * plane[i])


@njit(nogil=True)
def _contrast(planes, factor):
    shift = (ONE - factor) * np.float32(_luma_sum(planes[0], planes[1], planes[2]) / planes[0].size)
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _clip(factor * plane[i] + shift)


@njit(nogil=True, fastmath={"reassoc"})
def _luma_sum(red, green, blue):
    """In float64, in the order that suits the processor's vectors."""
    total = 0.0
    for i in range(red.size):
        total += _luma(red[i], green[i], blue[i])
    return total


@njit(nogil=True)
def _saturation(planes, factor):
    red, green, blue = planes[0], planes[1], planes[2]
    rest = ONE - factor
    for i in range(red.size):
        gray = rest * _luma(red[i], green[i], blue[i])
        red[i] = _clip(factor * red[i] + gray)
        green[i] = _clip(factor * green[i] + gray)
        blue[i] = _clip(factor * blue[i] + gray)


@njit(nogil=True)
def _hue(planes, shift):
    red, green, blue = planes[0], planes[1], planes[2]
    turn = np.float32(6.0) * shift
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        high = max(r, g, b)
        spread = high - min(r, g, b)
        inverse = ONE / (spread if spread > ZERO else ONE)
        # Hue in sixths of the circle, in [−1, 5).
        blue_part = np.float32(4.0) + (r - g) * inverse
        green_part = np.float32(2.0) + (b - r) * inverse
        red_part = (g - b) * inverse
        sixths = red_part if high == r else (green_part if high == g else blue_part)
        sixths += turn
        sixths -= np.float32(6.0) * np.floor(sixths * np.float32(1.0 / 6.0))
        # How far each channel is below the brightest one, as a share of the spread.
        red[i] = high - spread * _clip(np.float32(2.0) - abs(sixths - np.float32(3.0)))
        green[i] = high - spread * _clip(abs(sixths - np.float32(2.0)) - ONE)
        blue[i] = high - spread * _clip(abs(sixths - np.float32(4.0)) - ONE)


@njit(nogil=True)
def _grayscale(red, green, blue):
    """Luma, into `red`."""
    for i in range(red.size):
        red[i] = _luma(red[i], green[i], blue[i])


@njit(nogil=True)
def _gaussian(sigma, kernel_size):
    """Weights of the kernel, less its ends where they are negligible."""
    radius = kernel_size // 2
    weights = np.empty(kernel_size, np.float32)
    total = 0.0
    for t in range(kernel_size):
        weights[t] = np.exp(-0.5 * ((t - radius) / sigma) ** 2)
        total += weights[t]
    first, ends = 0, 2.0 * weights[0]
    while first < radius and ends < NEGLIGIBLE * total:
        total -= 2.0 * weights[first]
        first += 1
        ends += 2.0 * weights[first]
    kept = weights[first : kernel_size - first]
    for t in range(kept.size):
        kept[t] /= np.float32(total)
    return kept


@njit(nogil=True)
def _blur(plane, size, weights, out):
    """Blur along columns into a row, then along the row; the border reflects (without repeating the edge)."""
    radius = weights.size // 2
    row = np.empty(size + 2 * radius, np.float32)
    source, target, buffer = plane.ctypes.data, out.ctypes.data, row.ctypes.data
    pitch = size * FLOAT
    above_and_below, left_and_right = np.empty(weights.size, np.intp), np.empty(weights.size, np.intp)
    for t in range(weights.size):
        left_and_right[t] = buffer + t * FLOAT
    for y in range(size):
        for t in range(weights.size):
            other = abs(y + t - radius)
            above_and_below[t] = source + min(other, 2 * (size - 1) - other) * pitch
        _weighted_sum(above_and_below, weights, size, buffer + radius * FLOAT)
        for x in range(1, radius + 1):
            row[radius - x] = row[radius + x]
            row[radius + size - 1 + x] = row[radius + size - 1 - x]
        _weighted_sum(left_and_right, weights, size, target + y * pitch)


@njit(nogil=True)
def _weighted_sum(rows, weights, size, target):
    """Σ_t weights[t] · the row at address rows[t], into the row at `target`; `size` numbers, NUM_LANES or more."""
    last = (size - NUM_LANES) * FLOAT  # the last vector overlaps the one before, rather than the row's end
    for x in range(0, size * FLOAT, 2 * NUM_LANES * FLOAT):
        here, there = min(x, last), min(x + NUM_LANES * FLOAT, last)
        a, b = splat(ZERO), splat(ZERO)
        for t in range(weights.size):
            weight = splat(weights[t])
            a = multiply_add(load(rows[t] + here), weight, a)
            b = multiply_add(load(rows[t] + there), weight, b)
        store(target + here, a)
        store(target + there, b)


@njit(nogil=True)
def _solarize(plane, threshold):
    for i in range(plane.size):
        plane[i] = ONE - plane[i] if plane[i] >= threshold else plane[i]
