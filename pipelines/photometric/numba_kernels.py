"""The photometric chain of one image on the CPU, compiled by Numba.

The same definition as `pipelines.photometric.reference`, in float32, on three contiguous colour planes that stay in
the cache from the first operation to the last. Loops run over whole planes without branches, so that LLVM vectorises
them.

Legend: S the side; planes are float32 [3, S·S] in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.params import BRIGHTNESS, CONTRAST, HUE, SATURATION

RED_LUMA, GREEN_LUMA, BLUE_LUMA = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
ZERO, ONE, LEVELS = np.float32(0.0), np.float32(1.0), np.float32(255.0)


@njit(nogil=True, cache=True)
def photometric_image(crop, view, kernel_size, mean, std, planes, spare, out):
    """Jitter → gray → blur → solarize → normalise one image.

    Args:
        crop: uint8 [S, S, 3].
        view: one `VIEW_PARAMS` record.
        kernel_size: of the blur, odd.
        mean: float32 [3].
        std: float32 [3].
        planes: float32 scratch [3, S·S].
        spare: float32 scratch [S·S].
        out: float32 [S, S, 3]; written.
    """
    size = crop.shape[0]
    red, green, blue = planes[0], planes[1], planes[2]
    _load(crop.reshape(-1), red, green, blue)
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
    if view.gray:
        _grayscale(planes)
    if view.blur_sigma > ZERO and kernel_size > 1:
        weights = _gaussian(view.blur_sigma, kernel_size)
        for c in range(3):
            _blur_plane(planes[c], spare, size, weights)
    if view.solarize_threshold <= ONE:
        _solarize(planes, view.solarize_threshold)
    _store(red, green, blue, mean, std, out.reshape(-1))


@njit(nogil=True, cache=True)
def photometric_batch(crops, params, kernel_size, mean, std, out):
    """The chain over a batch, on the calling thread.

    Args:
        crops: uint8 [N, S, S, 3], contiguous.
        params: `VIEW_PARAMS` [N].
        kernel_size: of the blur, odd.
        mean: float32 [3].
        std: float32 [3].
        out: float32 [N, S, S, 3], contiguous; written.
    """
    num_pixels = crops.shape[1] * crops.shape[2]
    planes, spare = np.empty((3, num_pixels), np.float32), np.empty(num_pixels, np.float32)
    for i in range(crops.shape[0]):
        photometric_image(crops[i], params[i], kernel_size, mean, std, planes, spare, out[i])


@njit(nogil=True, cache=True)
def _load(pixels, red, green, blue):
    for i in range(red.size):
        red[i] = np.float32(pixels[3 * i]) / LEVELS
        green[i] = np.float32(pixels[3 * i + 1]) / LEVELS
        blue[i] = np.float32(pixels[3 * i + 2]) / LEVELS


@njit(nogil=True, cache=True)
def _store(red, green, blue, mean, std, pixels):
    red_mean, green_mean, blue_mean = mean[0], mean[1], mean[2]
    red_std, green_std, blue_std = std[0], std[1], std[2]
    for i in range(red.size):
        pixels[3 * i] = (red[i] - red_mean) / red_std
        pixels[3 * i + 1] = (green[i] - green_mean) / green_std
        pixels[3 * i + 2] = (blue[i] - blue_mean) / blue_std


@njit(nogil=True, cache=True)
def _clip(x):
    return min(max(x, ZERO), ONE)


@njit(nogil=True, cache=True)
def _luma(red, green, blue):
    return RED_LUMA * red + GREEN_LUMA * green + BLUE_LUMA * blue


@njit(nogil=True, cache=True)
def _brightness(planes, factor):
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _clip(factor * plane[i])


@njit(nogil=True, cache=True)
def _contrast(planes, factor):
    shift = (ONE - factor) * np.float32(_luma_sum(planes[0], planes[1], planes[2]) / planes[0].size)
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _clip(factor * plane[i] + shift)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _luma_sum(red, green, blue):
    """In float64, in the order that suits the processor's vectors."""
    total = 0.0
    for i in range(red.size):
        total += _luma(red[i], green[i], blue[i])
    return total


@njit(nogil=True, cache=True)
def _saturation(planes, factor):
    red, green, blue = planes[0], planes[1], planes[2]
    rest = ONE - factor
    for i in range(red.size):
        gray = rest * _luma(red[i], green[i], blue[i])
        red[i] = _clip(factor * red[i] + gray)
        green[i] = _clip(factor * green[i] + gray)
        blue[i] = _clip(factor * blue[i] + gray)


@njit(nogil=True, cache=True)
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
        red[i] = high - spread * _falloff(sixths + np.float32(5.0))
        green[i] = high - spread * _falloff(sixths + np.float32(3.0))
        blue[i] = high - spread * _falloff(sixths + ONE)


@njit(nogil=True, cache=True)
def _falloff(k):
    """How far a channel is below the brightest one, as a share of the spread, at `k` sixths of the circle."""
    k -= np.float32(6.0) * np.floor(k * np.float32(1.0 / 6.0))
    return min(max(min(k, np.float32(4.0) - k), ZERO), ONE)


@njit(nogil=True, cache=True)
def _grayscale(planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        gray = _luma(red[i], green[i], blue[i])
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@njit(nogil=True, cache=True)
def _gaussian(sigma, kernel_size):
    weights = np.empty(kernel_size, np.float32)
    radius = kernel_size // 2
    total = 0.0
    for t in range(kernel_size):
        weights[t] = np.exp(-0.5 * ((t - radius) / sigma) ** 2)
        total += weights[t]
    for t in range(kernel_size):
        weights[t] /= np.float32(total)
    return weights


@njit(nogil=True, cache=True)
def _blur_plane(plane, spare, size, weights):
    """Blur along rows into `spare`, then along columns back; the border reflects (without repeating the edge)."""
    radius = weights.size // 2
    for y in range(size):
        source = plane[y * size : (y + 1) * size]
        target = spare[y * size : (y + 1) * size]
        target[:] = ZERO
        for t in range(weights.size):
            weight, shift = weights[t], t - radius
            low, high = max(0, -shift), min(size, size - shift)
            for x in range(low):
                target[x] += weight * source[-(x + shift)]
            inner = source[low + shift : high + shift]
            middle = target[low:high]
            for x in range(high - low):
                middle[x] += weight * inner[x]
            for x in range(high, size):
                target[x] += weight * source[2 * (size - 1) - (x + shift)]
    for y in range(size):
        target = plane[y * size : (y + 1) * size]
        target[:] = ZERO
        for t in range(weights.size):
            row = abs(y + t - radius)
            row = min(row, 2 * (size - 1) - row)
            source = spare[row * size : (row + 1) * size]
            weight = weights[t]
            for x in range(size):
                target[x] += weight * source[x]


@njit(nogil=True, cache=True)
def _solarize(planes, threshold):
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = ONE - plane[i] if plane[i] >= threshold else plane[i]
