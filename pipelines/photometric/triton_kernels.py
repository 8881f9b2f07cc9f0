"""The photometric chain's GPU kernels, in Triton; `pipelines.photometric.triton_launch` starts them.

The same definition as `pipelines.photometric.reference`, in float32 registers:

    luma_sums    uint8 → the luma that each image's contrast is relative to: everything before the contrast, summed
    points       uint8 → rotate, jitter, gray → finished, or three planes [3, S, S] where a stencil comes after
    sobel        planes → the gradient's magnitude → finished

The blur has a module of its own, `triton_blur`. "Finished" is solarize → noise → cutout → normalise → cast, stored as
pixels. What a recipe can never ask for is left
out when a kernel is compiled; what one image does not ask for is a branch that all threads take alike.

Offsets within an image are 32-bit, those of images 64-bit.

Legend: S the side; a row is an image's packed parameters, int32 [NUM_WORDS] in the columns of `triton_pixels`; a slot
is an image's place in the planes; an image is [S, S, 3].
"""

import triton
import triton.language as tl

from pipelines.photometric.triton_pixels import (
    CONTRAST_STEP,
    GRAY,
    IMAGE,
    NUM_STEPS,
    NUM_WORDS,
    QUARTER_TURNS,
    finish,
    jitter,
    load_pixels,
    load_planes,
    load_run,
    luma,
    solarize,
    unrotated,
)


@triton.jit
def luma_sums_kernel(
    crops,
    rows,
    sums,
    size,
    SPAN: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Sum the luma of one span of an image as it is before its contrast step, if it has one.

    Args:
        crops: uint8 [N, S, S, 3].
        rows: int32 [N, NUM_WORDS].
        sums: float32 [N, NUM_SPANS] by row; written where there is a contrast step.
        size: S.
        SPAN: pixels of a program, a multiple of BLOCK.
        NUM_SPANS: programs of an image.
        BLOCK: pixels at a time.
        PACKED: S is even and `crops` aligned to 4 bytes.
    """
    program = tl.program_id(0)
    row = rows + (program // NUM_SPANS) * NUM_WORDS
    begin = (program % NUM_SPANS) * SPAN
    num_pixels = size * size
    contrast_step = tl.load(row + CONTRAST_STEP)
    if contrast_step >= 0:
        image = crops + tl.load(row + IMAGE).to(tl.int64) * (num_pixels * 3)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, min(begin + SPAN, num_pixels), BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < num_pixels
            if PACKED:
                red, green, blue = load_run(image, start, num_pixels, BLOCK)
            else:
                red, green, blue = load_pixels(image, pixel, inside)
            red, green, blue = jitter(row, red, green, blue, contrast_step, 0.0)
            total += tl.where(inside, luma(red, green, blue), 0.0)
        tl.store(sums + program, tl.sum(total))


@triton.jit(do_not_specialize=["first_row"])  # it differs from batch to batch
def points_kernel(
    crops,
    rows,
    sums,
    out,
    size,
    first_row,
    SPAN: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    JITTER: tl.constexpr,
    GRAYSCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    FINISH: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NOISE: tl.constexpr,
    FILL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Everything that looks at one pixel, over one span of an image.

    Args:
        crops: uint8 [N, S, S, 3].
        rows: int32 [N, NUM_WORDS].
        sums: float32 [N, NUM_SPANS] of `luma_sums_kernel`.
        out: [N, S, S, 3] if FINISH, else the planes [slots, 3, S, S].
        size: S.
        first_row: the row of slot 0; rows are taken from the grid's last to its first, since the luma's pass has just
            left the last ones in the cache.
        SPAN: pixels of a program, a multiple of BLOCK.
        NUM_SPANS: programs of an image, a power of two.
        BLOCK: pixels at a time.
        PACKED: S is even and `crops` aligned to 4 bytes.
        JITTER: whether the recipe can ask for it; likewise the next ones.
        GRAYSCALE: see JITTER.
        ROTATE: see JITTER.
        FINISH: no stencil follows.
        SOLARIZE: see JITTER.
        NOISE: see JITTER.
        FILL: likewise the cutout.
        SCALE: 1 / std of the channels.
        SHIFT: −mean / std.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slot = program // NUM_SPANS
    begin = (program % NUM_SPANS) * SPAN
    num_pixels = size * size
    row = rows + (first_row + slot) * NUM_WORDS
    index = tl.load(row + IMAGE).to(tl.int64)
    image = crops + index * (num_pixels * 3)
    mean = 0.0
    num_steps = 0
    if JITTER:
        num_steps = tl.load(row + NUM_STEPS)
        if tl.load(row + CONTRAST_STEP) >= 0:
            mean = tl.sum(tl.load(sums + (first_row + slot) * NUM_SPANS + tl.arange(0, NUM_SPANS))) / num_pixels
    for start in range(begin, min(begin + SPAN, num_pixels), BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < num_pixels
        if ROTATE:
            source = unrotated(pixel // size, pixel % size, size, tl.load(row + QUARTER_TURNS))
            red, green, blue = load_pixels(image, source, inside)
        elif PACKED:
            red, green, blue = load_run(image, start, num_pixels, BLOCK)
        else:
            red, green, blue = load_pixels(image, pixel, inside)
        if JITTER:
            red, green, blue = jitter(row, red, green, blue, num_steps, mean)
        if GRAYSCALE:  # noqa: SIM102 — this is decided when the kernel is compiled, and the next when it runs
            if tl.load(row + GRAY) != 0:
                red = luma(red, green, blue)
                green = red
                blue = red
        if FINISH:
            pixels = out + index * (num_pixels * 3) + start * 3 + tl.arange(0, BLOCK) * 3
            finish(
                row, pixels, pixel // size, pixel % size, size, inside, red, green, blue,
                SOLARIZE, NOISE, FILL, SCALE, SHIFT,
            )  # fmt: skip
        else:
            plane = out + slot.to(tl.int64) * (num_pixels * 3) + pixel
            tl.store(plane, red, mask=inside)
            tl.store(plane + num_pixels, green, mask=inside)
            tl.store(plane + 2 * num_pixels, blue, mask=inside)


@triton.jit(do_not_specialize=["first_row"])  # it differs from batch to batch
def sobel_kernel(
    planes,
    rows,
    out,
    size,
    first_row,
    BLOCK: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NOISE: tl.constexpr,
    FILL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The magnitude of the luma's gradient, over one block of an image: arguments as `points_kernel`'s."""
    num_pixels = size * size
    num_blocks = tl.cdiv(num_pixels, BLOCK)
    slot = tl.program_id(0) // num_blocks
    row = rows + (first_row + slot) * NUM_WORDS
    planes += slot.to(tl.int64) * (num_pixels * 3)
    pixel = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    y, x = pixel // size, pixel % size
    along_x = tl.zeros([BLOCK], tl.float32)
    along_y = tl.zeros([BLOCK], tl.float32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            if dy != 0 or dx != 0:
                there_y = size - 1 - tl.abs(size - 1 - tl.abs(y + dy))
                there_x = size - 1 - tl.abs(size - 1 - tl.abs(x + dx))
                red, green, blue = load_planes(planes, there_y * size + there_x, num_pixels, inside)
                if SOLARIZE:
                    red, green, blue = solarize(row, red, green, blue)
                value = luma(red, green, blue)
                along_x += dx * (2 - dy * dy) * value
                along_y += dy * (2 - dx * dx) * value
    gradient = tl.minimum(tl.sqrt(along_x * along_x + along_y * along_y), 1.0)
    image = out + tl.load(row + IMAGE).to(tl.int64) * (num_pixels * 3)
    finish(
        row, image + pixel * 3, y, x, size, inside, gradient, gradient, gradient, False, NOISE, FILL, SCALE, SHIFT
    )  # fmt: skip
