"""The photometric chain's Gaussian blur on a GPU, in Triton; `pipelines.photometric.triton_launch` starts it.

The same definition as `pipelines.photometric.reference`, on planes [3, S, S], in two ways:

    blur         float16: both axes in one pass, as two products with banded matrices, which tensor cores take
    blur_weights the bands of those matrices, once for each image, with the border's reflection folded in
    blur_axis    any dtype and radius, in float32: one axis blurred and the axes exchanged; twice is the whole blur

Legend: S the side; a row is an image's packed parameters, int32 [NUM_WORDS] in the columns of `triton_pixels`; a slot
is an image's place in the planes; an image is [S, S, 3].
"""

import triton
import triton.language as tl

from pipelines.photometric.triton_pixels import BLUR_FALLOFF, BLUR_RADIUS, IMAGE, NUM_WORDS, finish, load_planes


@triton.jit(do_not_specialize=["first_row"])  # it differs from batch to batch
def blur_weights_kernel(rows, weights, size, first_row, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The blur's matrix of one axis, S × S, as far as it is not zero: one tile of its rows.

    A weight is rounded once. A pixel of the window that is met directly and in the mirror gets both weights.

    Args:
        rows: int32 [N, NUM_WORDS].
        weights: float16 [slots, tiles, TILE, WINDOW].
        size: S.
        first_row: the row of slot 0.
        TILE: outputs of a program.
        WINDOW: inputs of a tile, from `window_start` on; at least TILE + 2 radii.
    """
    num_tiles = tl.cdiv(size, TILE)
    slot, first = tl.program_id(0) // num_tiles, (tl.program_id(0) % num_tiles) * TILE
    row = rows + (first_row + slot) * NUM_WORDS
    radius = tl.load(row + BLUR_RADIUS)
    falloff = tl.load(row + BLUR_FALLOFF).to(tl.float32, bitcast=True)
    output = first + tl.arange(0, TILE)[:, None]
    source = window_start(first, size, TILE, WINDOW) + tl.arange(0, WINDOW)[None, :]
    last = size - 1
    total = tl.zeros([TILE, WINDOW], tl.float32)
    for mirror in tl.static_range(3):
        if mirror == 0:
            place, real = source, source <= last
        elif mirror == 1:
            place, real = -source, (source > 0) & (source <= last)
        else:
            place, real = 2 * last - source, source < last
        tap = place - output
        total += tl.where(real & (tl.abs(tap) <= radius), tl.exp(falloff * (tap * tap)), 0.0)
    share = total / tl.sum(total, axis=1)[:, None]
    tile = weights + tl.program_id(0).to(tl.int64) * (TILE * WINDOW)
    place = tl.arange(0, TILE)[:, None] * WINDOW + tl.arange(0, WINDOW)[None, :]
    tl.store(tile + place, share.to(tl.float16))


@triton.jit(do_not_specialize=["first_row"])  # it differs from batch to batch
def blur_kernel(
    planes,
    rows,
    weights,
    out,
    size,
    first_row,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    ALIGN: tl.constexpr,
    FINISH: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NOISE: tl.constexpr,
    FILL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Blur some tiles of an image along both axes: the weights of rows · pixels · those of columns.

    Tiles side by side share half of what they read, which stays in the processor's own cache. What lies between the
    products is float16, as the planes are; the products add up in float32.

    Args:
        planes: float16 [slots, 3, S, S].
        rows: int32 [N, NUM_WORDS].
        weights: float16 [slots, tiles, TILE, WINDOW] of `blur_weights_kernel`.
        out: other planes [slots, 3, S, S], or [N, S, S, 3] if FINISH.
        size: S.
        first_row: the row of slot 0.
        TILE: side of a square that is made at a time.
        WINDOW: side of the square that is read for it.
        STRIP: tiles of a program, side by side.
        ALIGN: what S is divisible by.
        FINISH: no stencil follows.
        SOLARIZE: as `points_kernel`'s; likewise the next ones.
        NOISE: see SOLARIZE.
        FILL: see SOLARIZE.
        SCALE: see SOLARIZE.
        SHIFT: see SOLARIZE.
    """
    num_tiles = tl.cdiv(size, TILE)
    num_strips = tl.cdiv(num_tiles, STRIP)
    strip = tl.program_id(0) % (num_tiles * num_strips)
    slot = tl.program_id(0) // (num_tiles * num_strips)
    tile_y, begin = strip // num_strips, (strip % num_strips) * STRIP
    num_pixels = size * size
    row = rows + (first_row + slot) * NUM_WORDS
    weights += slot.to(tl.int64) * (num_tiles * TILE * WINDOW)
    planes += slot.to(tl.int64) * (num_pixels * 3)
    inner, outer = tl.arange(0, TILE), tl.arange(0, WINDOW)
    down = tl.load(weights + tile_y * (TILE * WINDOW) + inner[:, None] * WINDOW + outer[None, :])
    y = tile_y * TILE + inner[:, None]
    source_y = window_start(tile_y * TILE, size, TILE, WINDOW) + outer[:, None]
    for tile_x in range(begin, min(begin + STRIP, num_tiles)):
        along = tl.load(weights + tile_x * (TILE * WINDOW) + inner[None, :] * WINDOW + outer[:, None])
        source_x = tl.multiple_of(window_start(tile_x * TILE, size, TILE, WINDOW), ALIGN) + outer[None, :]
        there = (source_y < size) & (source_x < size)
        source = planes + source_y * size + source_x
        red = _blurred(source, down, along, there)
        green = _blurred(source + num_pixels, down, along, there)
        blue = _blurred(source + 2 * num_pixels, down, along, there)
        x = tile_x * TILE + inner[None, :]
        inside = (y < size) & (x < size)
        if FINISH:
            pixels = out + tl.load(row + IMAGE).to(tl.int64) * (num_pixels * 3) + (y * size + x) * 3
            finish(row, pixels, y, x, size, inside, red, green, blue, SOLARIZE, NOISE, FILL, SCALE, SHIFT)
        else:
            plane = out + slot.to(tl.int64) * (num_pixels * 3) + y * size + x
            tl.store(plane, red, mask=inside)
            tl.store(plane + num_pixels, green, mask=inside)
            tl.store(plane + 2 * num_pixels, blue, mask=inside)


@triton.jit
def window_start(first, size, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the inputs of a tile begin: around it, but within the image if that is large enough."""
    return tl.maximum(tl.minimum(first - (WINDOW - TILE) // 2, size - WINDOW), 0)


@triton.jit
def _blurred(source, down, along, there):
    plane = tl.load(source, mask=there, other=0.0)
    return tl.dot(tl.dot(down, plane).to(tl.float16), along)


@triton.jit(do_not_specialize=["first_row"])  # it differs from batch to batch
def blur_axis_kernel(
    planes,
    rows,
    out,
    size,
    first_row,
    TILE: tl.constexpr,
    FINISH: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NOISE: tl.constexpr,
    FILL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Blur along the slow axis of the planes, reflecting at the border, and exchange the axes.

    Neighbouring threads read neighbouring numbers for every tap, which they could not along the fast axis.

    Args:
        planes: [slots, 3, S, S].
        rows: int32 [N, NUM_WORDS].
        out: the planes [slots, 3, S, S] with exchanged axes, or [N, S, S, 3] if FINISH.
        size: S.
        first_row: the row of slot 0.
        TILE: side of the square that a program makes.
        FINISH: this is the second pass, along columns, and no stencil follows.
        SOLARIZE: as `points_kernel`'s; likewise the next ones.
        NOISE: see SOLARIZE.
        FILL: see SOLARIZE.
        SCALE: see SOLARIZE.
        SHIFT: see SOLARIZE.
    """
    tiles_per_side = tl.cdiv(size, TILE)
    tile = tl.program_id(0) % (tiles_per_side * tiles_per_side)
    slot = tl.program_id(0) // (tiles_per_side * tiles_per_side)
    num_pixels = size * size
    row = rows + (first_row + slot) * NUM_WORDS
    planes += slot.to(tl.int64) * (num_pixels * 3)
    first_slow, first_fast = (tile // tiles_per_side) * TILE, (tile % tiles_per_side) * TILE
    down, along = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    slow, fast = first_slow + down, first_fast + along
    inside = (slow < size) & (fast < size)
    red, green, blue = load_planes(planes, slow * size + fast, num_pixels, inside)
    falloff = tl.load(row + BLUR_FALLOFF).to(tl.float32, bitcast=True)
    total = 1.0
    for tap in range(1, tl.load(row + BLUR_RADIUS) + 1):
        weight = tl.exp(falloff * (tap * tap))
        total += 2.0 * weight
        before = tl.abs(slow - tap) * size + fast
        after = (size - 1 - tl.abs(size - 1 - slow - tap)) * size + fast
        red_1, green_1, blue_1 = load_planes(planes, before, num_pixels, inside)
        red_2, green_2, blue_2 = load_planes(planes, after, num_pixels, inside)
        red += weight * (red_1 + red_2)
        green += weight * (green_1 + green_2)
        blue += weight * (blue_1 + blue_2)
    share = 1.0 / total
    red, green, blue = red * share, green * share, blue * share
    if FINISH:  # columns are the slow axis here
        image = out + tl.load(row + IMAGE).to(tl.int64) * (num_pixels * 3)
        pixels = image + (first_fast * size + first_slow) * 3 + down * (size * 3) + along * 3
        finish(
            row, pixels, first_fast + down, first_slow + along, size, tl.trans(inside),
            tl.trans(red), tl.trans(green), tl.trans(blue), SOLARIZE, NOISE, FILL, SCALE, SHIFT,
        )  # fmt: skip
    else:
        plane = out + slot.to(tl.int64) * (num_pixels * 3) + fast * size + slow
        tl.store(plane, red, mask=inside)
        tl.store(plane + num_pixels, green, mask=inside)
        tl.store(plane + 2 * num_pixels, blue, mask=inside)
