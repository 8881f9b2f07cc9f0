"""Crop a window and resize it with an antialiased triangle filter, as torchvision's `resized_crop(antialias=True)`.

Each output pixel is a weighted mean of the window's pixels; the weights fall off linearly over `max(scale, 1)` pixels
on either side of its centre (the filter of Pillow's BILINEAR and of torch's antialiased `interpolate`). The window is
cut first, so nothing outside it bleeds in. Rows are combined first, along memory, then columns; one rounding at the
end.

The input may have any number of channels at least three (four after a JPEG decode); the output has the first three.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def max_taps(in_size: int, out_size: int) -> int:
    """The most input pixels that can weigh on one output pixel."""
    return int(np.ceil(2.0 * max(in_size / out_size, 1.0))) + 2


@njit(nogil=True, cache=True)
def triangle_weights(in_size, out_size, first, count, weights):
    """Fill the filter of one axis.

    Args:
        in_size: pixels of the window along the axis.
        out_size: pixels of the output.
        first: int32 [≥ out_size]; first input pixel of each output pixel.
        count: int32 [≥ out_size]; how many input pixels weigh.
        weights: float32 [≥ out_size, taps]; the normalised weights.
    """
    scale = in_size / out_size
    support = max(scale, 1.0)
    for i in range(out_size):
        center = scale * (i + 0.5)
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), in_size)
        total = 0.0
        for j in range(high - low):
            weight = max(0.0, 1.0 - abs((j + low - center + 0.5) / support))
            weights[i, j] = weight
            total += weight
        for j in range(high - low):
            weights[i, j] /= np.float32(total)
        first[i] = low
        count[i] = high - low


@njit(nogil=True, cache=True)
def resized_crop(image, top, left, height, width, flip, out, row, first, count, weights):
    """Resize one window of an image.

    Args:
        image: uint8 [H, W, C], contiguous.
        top: first row of the window; likewise left, and height and width ≥ 1, all inside the image.
        left: first column.
        height: rows.
        width: columns.
        flip: mirror the output from left to right.
        out: uint8 [S, S, 3]; written.
        row: float32 scratch [≥ width · C].
        first: int32 scratch [2, ≥ S].
        count: int32 scratch [2, ≥ S].
        weights: float32 scratch [2, ≥ S, ≥ taps of either axis].
    """
    size = out.shape[0]
    channels = image.shape[2]
    triangle_weights(height, size, first[0], count[0], weights[0])
    triangle_weights(width, size, first[1], count[1], weights[1])
    flat = image.reshape(image.shape[0], image.shape[1] * channels)
    length = width * channels
    begin = left * channels
    for y in range(size):
        _combine_rows(flat, top + first[0, y], count[0, y], weights[0, y], begin, length, row)
        for x in range(size):
            low = first[1, x] * channels
            red = np.float32(0.5)  # half a level, so that truncation rounds
            green = np.float32(0.5)
            blue = np.float32(0.5)
            for t in range(count[1, x]):
                weight = weights[1, x, t]
                at = low + t * channels
                red += weight * row[at]
                green += weight * row[at + 1]
                blue += weight * row[at + 2]
            target = size - 1 - x if flip else x
            out[y, target, 0] = np.uint8(min(red, np.float32(255.0)))
            out[y, target, 1] = np.uint8(min(green, np.float32(255.0)))
            out[y, target, 2] = np.uint8(min(blue, np.float32(255.0)))


@njit(nogil=True, cache=True)
def _combine_rows(flat, top, num_rows, weights, begin, length, row):
    """row[k] = Σ_t weights[t] · flat[top + t, begin + k], contiguous in k so that it is vectorised."""
    source = flat[top, begin : begin + length]
    weight = weights[0]
    for k in range(length):
        row[k] = weight * np.float32(source[k])
    for t in range(1, num_rows):
        source = flat[top + t, begin : begin + length]
        weight = weights[t]
        for k in range(length):
            row[k] += weight * np.float32(source[k])
