"""What the photometric chain's GPU kernels do to pixels, in Triton: device functions, in float32 registers.

The definitions are `pipelines.photometric.reference`'s.

Legend: S the side; a row is an image's packed parameters, int32 [NUM_WORDS] in the columns below; red, green and blue
are float32 tensors of one shape, in [0, 1]; an image is [S, S, 3].
"""

import triton
import triton.language as tl

from pipelines.params import CONTRAST, HUE, SATURATION
from pipelines.rng import GAMMA, MULTIPLIER_1, MULTIPLIER_2

# Columns of a row; float32 ones as their bits.
IMAGE = tl.constexpr(0)
NUM_STEPS = tl.constexpr(1)  # of the jitter
CONTRAST_STEP = tl.constexpr(2)  # or −1
ORDER = tl.constexpr(3)  # an operation in each byte, the first one lowest
FACTOR = tl.constexpr(4)  # four float32, indexed by the operation
GRAY = tl.constexpr(8)
BLUR_RADIUS = tl.constexpr(9)  # taps on either side
BLUR_FALLOFF = tl.constexpr(10)  # float32, −1 / (2 σ²)
SOLARIZE_THRESHOLD = tl.constexpr(11)  # float32
QUARTER_TURNS = tl.constexpr(12)
NOISE_STD = tl.constexpr(13)  # float32
NOISE_KEY = tl.constexpr(14)  # two words, the low one first
CUTOUT = tl.constexpr(16)  # top, left, height, width
NUM_WORDS = tl.constexpr(20)

_CONTRAST, _SATURATION, _HUE = tl.constexpr(CONTRAST), tl.constexpr(SATURATION), tl.constexpr(HUE)
_GAMMA, _MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(GAMMA), tl.constexpr(MULTIPLIER_1), tl.constexpr(MULTIPLIER_2)


@triton.jit
def load_pixels(image, pixel, inside):
    """Channels of pixels of a uint8 image, in [0, 1]."""
    red = tl.load(image + pixel * 3, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0)
    green = tl.load(image + pixel * 3 + 1, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0)
    blue = tl.load(image + pixel * 3 + 2, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0)
    return red, green, blue


@triton.jit
def load_run(image, start, num_pixels, BLOCK: tl.constexpr):
    """Channels of the pixels from `start` on, as `load_pixels` gives them, but by words: three of them are four pixels.

    The image is aligned to 4 bytes, and its pixels and `start` are divisible by 4.
    """
    group = start // 4 + tl.arange(0, BLOCK // 4)
    words = image.to(tl.pointer_type(tl.int32)) + group * 3
    inside = group * 4 < num_pixels
    first = tl.load(words, mask=inside, other=0)  # r g b r, the lowest byte first
    second = tl.load(words + 1, mask=inside, other=0)  # g b r g
    third = tl.load(words + 2, mask=inside, other=0)  # b r g b
    red = _interleaved(first, first >> 24, second >> 16, third >> 8, BLOCK)
    green = _interleaved(first >> 8, second, second >> 24, third >> 16, BLOCK)
    blue = _interleaved(first >> 16, second >> 8, third, third >> 24, BLOCK)
    return red, green, blue


@triton.jit
def _interleaved(a, b, c, d, BLOCK: tl.constexpr):
    """The lowest bytes of four words in turn, in [0, 1]."""
    bytes_ = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK]) & 255
    return bytes_.to(tl.float32) * (1.0 / 255.0)


@triton.jit
def load_planes(planes, pixel, num_pixels, inside):
    """Channels of pixels of three planes."""
    red = tl.load(planes + pixel, mask=inside, other=0.0).to(tl.float32)
    green = tl.load(planes + num_pixels + pixel, mask=inside, other=0.0).to(tl.float32)
    blue = tl.load(planes + 2 * num_pixels + pixel, mask=inside, other=0.0).to(tl.float32)
    return red, green, blue


@triton.jit
def unrotated(y, x, size, turns):
    """The pixel that comes to (y, x) by so many counter-clockwise quarter turns."""
    last = size - 1
    source_y = tl.where(turns == 0, y, tl.where(turns == 1, x, tl.where(turns == 2, last - y, last - x)))
    source_x = tl.where(turns == 0, x, tl.where(turns == 1, last - y, tl.where(turns == 2, last - x, y)))
    return source_y * size + source_x


@triton.jit
def jitter(row, red, green, blue, num_steps, mean):
    """The first steps of a row's jitter, with the mean luma that contrast is relative to."""
    order = tl.load(row + ORDER)
    for step in range(num_steps):
        op = (order >> (8 * step)) & 255
        factor = tl.load(row + FACTOR + op).to(tl.float32, bitcast=True)
        if op == _HUE:
            red, green, blue = _hue(red, green, blue, factor)
        elif op == _SATURATION:
            gray = (1.0 - factor) * luma(red, green, blue)
            red, green, blue = _clip(factor * red + gray), _clip(factor * green + gray), _clip(factor * blue + gray)
        else:
            shift = tl.where(op == _CONTRAST, (1.0 - factor) * mean, 0.0)
            red, green, blue = _clip(factor * red + shift), _clip(factor * green + shift), _clip(factor * blue + shift)
    return red, green, blue


@triton.jit
def _hue(red, green, blue, shift):
    """Turn the colour circle by a share of the whole turn.

    The piecewise-linear form of HSV → RGB, multiplied by the spread between the brightest and the darkest channel: no
    division, and gray needs no case of its own. The hue runs over [−1, 5] sixths of the circle, where each channel is
    one clipped distance.
    """
    high = tl.maximum(red, tl.maximum(green, blue))
    low = tl.minimum(red, tl.minimum(green, blue))
    spread = high - low
    hue = tl.where(
        high == red, green - blue, tl.where(high == green, 2.0 * spread + (blue - red), 4.0 * spread + (red - green))
    )
    hue += 6.0 * (shift - tl.floor(shift)) * spread
    hue = tl.where(hue >= 5.0 * spread, hue - 6.0 * spread, hue)
    below = low - spread
    new_red = tl.minimum(tl.maximum(tl.abs(hue - 3.0 * spread) + below, low), high)
    new_green = tl.minimum(tl.maximum(high + spread - tl.abs(hue - 2.0 * spread), low), high)
    new_blue = tl.minimum(tl.maximum(tl.abs(hue - spread) + below, low), high)
    return new_red, new_green, new_blue


@triton.jit
def solarize(row, red, green, blue):
    """Invert values at or above the row's threshold."""
    threshold = tl.load(row + SOLARIZE_THRESHOLD).to(tl.float32, bitcast=True)
    red = tl.where(red >= threshold, 1.0 - red, red)
    green = tl.where(green >= threshold, 1.0 - green, green)
    blue = tl.where(blue >= threshold, 1.0 - blue, blue)
    return red, green, blue


@triton.jit
def _normal(key, value):
    """Standard normal numbers: `pipelines.rng.bits(key, value)` through the Box–Muller transform."""
    word = key + (value.to(tl.uint64) + 1) * _GAMMA
    word = (word ^ (word >> 30)) * _MULTIPLIER_1
    word = (word ^ (word >> 27)) * _MULTIPLIER_2
    word = word ^ (word >> 31)
    u = ((word >> 40) + 1).to(tl.uint32).to(tl.float32) * (2.0**-24)
    w = ((word >> 16) & 0xFFFFFF).to(tl.uint32).to(tl.float32) * (2.0**-24)
    # cos(2π w) = 2 sin²(π (w − 1/2)) − 1, and the sine of at most a quarter turn by its series to the 11th power: to
    # 1e-7, and in fewer registers than a cosine of any angle.
    angle = 3.141592653589793 * (w - 0.5)
    square = angle * angle
    series = 1.0 - square * (1.0 / 72.0) * (1.0 - square * (1.0 / 110.0))
    series = 1.0 - square * (1.0 / 20.0) * (1.0 - square * (1.0 / 42.0) * series)
    sine = angle * (1.0 - square * (1.0 / 6.0) * series)
    return tl.sqrt(-2.0 * tl.log(u)) * (2.0 * sine * sine - 1.0)


@triton.jit
def luma(red, green, blue):
    """Torchvision's weights of red, green, blue."""
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def finish(
    row, pixels, y, x, size, inside, red, green, blue,
    SOLARIZE: tl.constexpr, NOISE: tl.constexpr, FILL: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Solarize → noise → cutout → normalise → cast → store, at pointers to pixels, which are those at (y, x)."""
    if SOLARIZE:
        red, green, blue = solarize(row, red, green, blue)
    if NOISE:
        std = tl.load(row + NOISE_STD).to(tl.float32, bitcast=True)
        if std > 0.0:
            key = tl.load(row + NOISE_KEY).to(tl.uint32, bitcast=True).to(tl.uint64)
            key += tl.load(row + NOISE_KEY + 1).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
            value = 3 * (y * size + x)
            red = _clip(red + std * _normal(key, value))
            green = _clip(green + std * _normal(key, value + 1))
            blue = _clip(blue + std * _normal(key, value + 2))
    red = red * SCALE[0] + SHIFT[0]
    green = green * SCALE[1] + SHIFT[1]
    blue = blue * SCALE[2] + SHIFT[2]
    if FILL:
        top, left = tl.load(row + CUTOUT), tl.load(row + CUTOUT + 1)
        bottom, right = top + tl.load(row + CUTOUT + 2), left + tl.load(row + CUTOUT + 3)
        filled = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        red, green, blue = tl.where(filled, 0.0, red), tl.where(filled, 0.0, green), tl.where(filled, 0.0, blue)
    store_pixels(pixels, inside, red, green, blue)


@triton.jit
def store_pixels(pixels, inside, red, green, blue):
    """Store the channels at pointers to pixels, side by side, so that a warp writes unbroken runs."""
    channel = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
    for _ in tl.static_range(len(pixels.shape)):
        channel = tl.expand_dims(channel, 0)
    pixels = tl.expand_dims(tl.expand_dims(pixels, -1), -1)
    inside = tl.expand_dims(tl.expand_dims(inside, -1), -1)
    values = tl.join(tl.join(red, blue), tl.join(green, blue))  # the fourth one is masked
    tl.store(pixels + channel, values, mask=inside & (channel < 3))
