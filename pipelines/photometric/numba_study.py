"""The operations that only the study of single transformations uses: rotation, Sobel filter, noise, cutout.

The definitions are those of `pipelines.photometric.reference`. They are rare, so they are written to be read.

Legend: S the side of a view; an image is float32 [S, S, 3] in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.rng import GAMMA, MULTIPLIER_1, MULTIPLIER_2

ZERO, ONE = np.float32(0.0), np.float32(1.0)


@njit(nogil=True)
def rotate_plane(plane, size, quarter_turns, spare):
    """Turn [S·S] counter-clockwise, by way of `spare` of the same size."""
    spare[:] = plane
    last = size - 1
    for y in range(size):
        for x in range(size):
            if quarter_turns == 1:
                source = x * size + last - y
            elif quarter_turns == 2:
                source = (last - y) * size + last - x
            else:
                source = (last - x) * size + y
            plane[y * size + x] = spare[source]


@njit(nogil=True)
def study(image, view, mean, std, luma):
    """Sobel → noise → cutout → normalise, in place.

    Args:
        image: float32 [S, S, 3].
        view: one `VIEW_PARAMS` record.
        mean: float32 [3].
        std: float32 [3].
        luma: float32 scratch [S·S].
    """
    if view.sobel:
        _sobel(image, luma)
    if view.noise_std > ZERO:
        _add_noise(image.reshape(-1), view.noise_std, view.noise_key)
    for y in range(view.cutout_top, view.cutout_top + view.cutout_height):
        for x in range(view.cutout_left, view.cutout_left + view.cutout_width):
            for c in range(3):
                image[y, x, c] = mean[c]
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                image[y, x, c] = (image[y, x, c] - mean[c]) / std[c]


@njit(nogil=True)
def _sobel(image, luma):
    size = image.shape[0]
    for y in range(size):
        for x in range(size):
            red, green, blue = image[y, x, 0], image[y, x, 1], image[y, x, 2]
            luma[y * size + x] = np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    for y in range(size):
        above, here, below = abs(y - 1) * size, y * size, (size - 1 - abs(size - 2 - y)) * size
        for x in range(size):
            left, right = abs(x - 1), size - 1 - abs(size - 2 - x)
            two = np.float32(2.0)
            across = (
                luma[above + right]
                - luma[above + left]
                + two * (luma[here + right] - luma[here + left])
                + luma[below + right]
                - luma[below + left]
            )
            down = (
                luma[below + left]
                - luma[above + left]
                + two * (luma[below + x] - luma[above + x])
                + luma[below + right]
                - luma[above + right]
            )
            magnitude = min(np.sqrt(across * across + down * down), ONE)
            for c in range(3):
                image[y, x, c] = magnitude


@njit(nogil=True)
def _add_noise(values, std, key):
    for i in range(values.size):
        word = _bits(key, np.uint64(i))
        u = np.float64((word >> np.uint64(40)) + np.uint64(1)) * 2.0**-24
        w = np.float64((word >> np.uint64(16)) & np.uint64(0xFFFFFF)) * 2.0**-24
        normal = np.float32(np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * w))
        values[i] = min(max(values[i] + std * normal, ZERO), ONE)


@njit(nogil=True)
def _bits(key, draw):
    """`rng.bits` of one address."""
    x = key + (draw + np.uint64(1)) * np.uint64(GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))
