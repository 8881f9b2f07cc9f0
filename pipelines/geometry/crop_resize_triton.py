"""Crop and resize on the GPU, in Triton: a square of output pixels a program.

A program combines the rows that weigh on its output rows, some columns of the window at a time, and multiplies these
by the matrix of the columns' weights: both axes of the separable filter, with nothing in memory between them. Loops
run as far as a window's scale asks; any window works, from one pixel to a panorama.

Positions are exact: an output pixel's centre, extent · (2i + 1) / (2S), is kept as a whole pixel and a fraction.

Legend: N images, S the side of the view; a window is int32 [NUM_WORDS]: top, left, height, width, flip.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.params import ViewParams
from pipelines.photometric.reference import to_device
from pipelines.photometric.triton_launch import Launch
from pipelines.photometric.triton_pixels import store_pixels
from pipelines.recipe import ViewRecipe

TILE = 32  # side of a program's square of output pixels
COLUMNS = 16  # of the window at a time: more would take more registers than there are
NUM_WORDS = tl.constexpr(5)


def crop_resize_triton(pixels: Tensor, offsets: Tensor, widths: Tensor, params: ViewParams, view: ViewRecipe) -> Tensor:
    """Crops uint8 [N, 3, S, S], channels_last: arguments as `PackedImages`' and `crop_resize`'s.

    On the current stream, without waiting for it.
    """
    out = torch.empty(
        (len(params), 3, view.size, view.size),
        dtype=torch.uint8,
        device=pixels.device,
        memory_format=torch.channels_last,
    )
    if len(params) > 0:
        with torch.cuda.device(pixels.get_device()):
            crop_launch(pixels.contiguous(), offsets.contiguous(), widths.contiguous(), params, view, out).run()
    return out


def crop_launch(
    pixels: Tensor, offsets: Tensor, widths: Tensor, params: ViewParams, view: ViewRecipe, out: Tensor
) -> Launch:
    """What has to run to fill `out` [N ≥ 1, 3, S, S]."""
    fields = ("top", "left", "height", "width", "flip")
    windows = to_device(np.stack([params[name].astype(np.int32) for name in fields], axis=1), pixels.device)
    num_programs = len(params) * triton.cdiv(view.size, TILE) ** 2
    constants = {"CUBIC": view.interpolation == "bicubic", "TILE": TILE, "COLUMNS": COLUMNS}
    arguments = (pixels, offsets, widths, windows, out, view.size)
    return Launch(crop_resize_kernel, num_programs, arguments, constants)


@triton.jit
def crop_resize_kernel(
    pixels,
    offsets,
    widths,
    windows,
    out,
    size,
    CUBIC: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One square of one image's crop.

    Args:
        pixels: uint8, the images' bytes.
        offsets: int64 [N].
        widths: int32 [N], of the images.
        windows: int32 [N, NUM_WORDS].
        out: uint8 [N, S, S, 3]; written.
        size: S.
        CUBIC: Keys' cubic with a = −1/2 rather than the triangle.
        TILE: side of the square.
        COLUMNS: of the window at a time.
    """
    tiles_per_side = tl.cdiv(size, TILE)
    tile = tl.program_id(0) % (tiles_per_side * tiles_per_side)
    index = tl.program_id(0) // (tiles_per_side * tiles_per_side)
    window = windows + index * NUM_WORDS
    height, width = tl.load(window + 2), tl.load(window + 3)
    pitch = tl.load(widths + index).to(tl.int64) * 3
    origin = pixels + tl.load(offsets + index) + tl.load(window) * pitch + tl.load(window + 1) * 3

    first_y, first_x = (tile // tiles_per_side) * TILE, (tile % tiles_per_side) * TILE
    y, x = first_y + tl.arange(0, TILE), first_x + tl.arange(0, TILE)
    last = size - 1
    stretch_y, taps_y = _stretch(height, size, CUBIC)
    stretch_x, taps_x = _stretch(width, size, CUBIC)
    pixel_y, fraction_y, low_y = _center(tl.minimum(y, last), height, size, stretch_y, CUBIC)
    pixel_x, fraction_x, _ = _center(tl.minimum(x, last), width, size, stretch_x, CUBIC)
    _, _, low_x = _center(first_x, width, size, stretch_x, CUBIC)
    _, _, high_x = _center(tl.minimum(first_x + TILE - 1, last), width, size, stretch_x, CUBIC)

    red = tl.zeros([TILE, TILE], tl.float32)
    green = tl.zeros([TILE, TILE], tl.float32)
    blue = tl.zeros([TILE, TILE], tl.float32)
    total_x = tl.zeros([TILE], tl.float32)
    end = tl.minimum(high_x + taps_x, width)
    for start in range(tl.maximum(low_x, 0), end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        row_red = tl.zeros([TILE, COLUMNS], tl.float32)
        row_green = tl.zeros([TILE, COLUMNS], tl.float32)
        row_blue = tl.zeros([TILE, COLUMNS], tl.float32)
        total_y = tl.zeros([TILE], tl.float32)
        for tap in range(taps_y):
            row = low_y + tap
            weight = _filter(((row - pixel_y) + (0.5 - fraction_y)) / stretch_y, CUBIC)
            weight = tl.where((row >= 0) & (row < height), weight, 0.0)
            total_y += weight
            source = origin + row[:, None] * pitch + column[None, :] * 3
            inside = (weight != 0.0)[:, None] & (column < end)[None, :]
            row_red += weight[:, None] * tl.load(source, mask=inside, other=0).to(tl.float32)
            row_green += weight[:, None] * tl.load(source + 1, mask=inside, other=0).to(tl.float32)
            row_blue += weight[:, None] * tl.load(source + 2, mask=inside, other=0).to(tl.float32)
        distance = (column[:, None] - pixel_x[None, :]) + (0.5 - fraction_x)[None, :]
        weights = tl.where((column < end)[:, None], _filter(distance / stretch_x, CUBIC), 0.0)
        total_x += tl.sum(weights, axis=0)
        share_y = (1.0 / total_y)[:, None]
        # Three TensorFloat-32 products: as exact as float32, where one would be off by a tenth of a level.
        red = tl.dot(row_red * share_y, weights, red, input_precision="tf32x3")
        green = tl.dot(row_green * share_y, weights, green, input_precision="tf32x3")
        blue = tl.dot(row_blue * share_y, weights, blue, input_precision="tf32x3")

    share_x = (1.0 / total_x)[None, :]
    x_out = tl.where(tl.load(window + 4) != 0, last - x, x)
    image = out + index.to(tl.int64) * (size * size * 3)
    target = image + (y[:, None] * size + x_out[None, :]) * 3
    inside = (y < size)[:, None] & (x < size)[None, :]
    store_pixels(target, inside, _to_byte(red * share_x), _to_byte(green * share_x), _to_byte(blue * share_x))


@triton.jit
def _stretch(extent, size, CUBIC: tl.constexpr):
    """How much wider the filter is than at scale 1, and how many pixels can lie under it."""
    stretch = tl.maximum(extent.to(tl.float32) / size, 1.0)
    diameter = 4.0 if CUBIC else 2.0
    return stretch, tl.ceil(diameter * stretch).to(tl.int32)


@triton.jit
def _center(i, extent, size, stretch, CUBIC: tl.constexpr):
    """The centre of output pixel i in the window, as a pixel and a fraction, and the first pixel under the filter."""
    numerator = extent * (2 * i + 1)
    pixel = numerator // (2 * size)
    fraction = (numerator - pixel * (2 * size)).to(tl.float32) / (2 * size)
    radius = 2.0 if CUBIC else 1.0
    return pixel, fraction, pixel + tl.floor(fraction + 0.5 - radius * stretch).to(tl.int32)


@triton.jit
def _filter(distance, CUBIC: tl.constexpr):
    """The triangle, or Keys' cubic with a = −1/2; 0 beyond its end."""
    t = tl.abs(distance)
    if CUBIC:
        inner = (1.5 * t - 2.5) * t * t + 1.0
        outer = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
        weight = tl.where(t < 1.0, inner, tl.where(t < 2.0, outer, 0.0))
    else:
        weight = tl.maximum(1.0 - t, 0.0)
    return weight


@triton.jit
def _to_byte(level):
    """Rounded: half a level is added and the conversion truncates."""
    return tl.minimum(tl.maximum(level + 0.5, 0.0), 255.0).to(tl.uint8)
