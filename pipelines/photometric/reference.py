"""The photometric chain in plain torch: the definition that the other implementations are held against.

Works on any device and in float32 or float64, over a batch whose images each have parameters of their own:
rotate → jitter (random order, clipped to [0, 1] after each operation) → gray → blur → solarize → sobel → noise → cutout
→ normalise.

Each operation follows torchvision's functional one on float images (`adjust_brightness`, `adjust_contrast`,
`adjust_saturation`, `adjust_hue`, `rgb_to_grayscale`, `gaussian_blur`, `solarize`); random order and probabilities
are SimCLR's (v1, appendix A). Rotation, Sobel filter, noise and cutout are those of its figure 4, which its released
code does not contain: the definitions here are ours.

Legend: N images, H×W pixels; images are [N, 3, H, W] in [0, 1]; factors are [N].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NUM_JITTER_OPS, SATURATION, ViewParams
from pipelines.recipe import Recipe, ViewRecipe
from pipelines.rng import bits

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue


def photometric(
    images_u8: Tensor,
    params: ViewParams,
    view: ViewRecipe,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply the chain to crops.

    Args:
        images_u8: uint8 [N, 3, H, W], any memory format, any device.
        params: `VIEW_PARAMS` [N].
        view: the recipe of this view (its blur kernel).
        recipe: mean and std.
        dtype: of the arithmetic and of the result, float32 or float64.

    Returns:
        [N, 3, H, W], channels_last, normalised.
    """
    images = images_u8.to(dtype) / 255.0
    if len(images) == 0:
        return images

    def column(name: str) -> Tensor:
        return to_device(params[name].copy(), images.device)

    if view.rotate_prob > 0.0:
        images = rotate(images, column("quarter_turns"))
    if view.jitter_prob > 0.0:
        images = jitter(images, column("jitter_order"), column("jitter_factor").to(dtype))
    if view.gray_prob > 0.0:
        images = torch.where(_per_image(column("gray")), grayscale(images), images)
    if view.blur_prob > 0.0:
        images = blur(images, column("blur_sigma").to(dtype), view.blur_kernel)
    if view.solarize_prob > 0.0:
        images = solarize(images, column("solarize_threshold").to(dtype))
    if view.sobel_prob > 0.0:
        images = torch.where(_per_image(column("sobel")), sobel(images), images)
    if view.noise_prob > 0.0:
        images = add_noise(images, params)
    if view.cutout_prob > 0.0:
        rectangle = [column(f"cutout_{name}") for name in ("top", "left", "height", "width")]
        images = cutout(images, *rectangle, fill=recipe.mean)
    images = normalize(images, recipe.mean, recipe.std)
    return images.contiguous(memory_format=torch.channels_last)


def jitter(images: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order.

    Args:
        images: [N, 3, H, W].
        order: int [N, 4]; the operation of each step, or NO_OP.
        factor: [N, 4], indexed by the operation.
    """
    for step in range(NUM_JITTER_OPS):
        for op, apply in _JITTER_OPS.items():
            chosen = order[:, step] == op
            images = torch.where(_per_image(chosen), apply(images, factor[:, op]), images)
    return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply, and clip to [0, 1]."""
    return _blend(images, torch.zeros_like(images), factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the image's mean gray, and clip."""
    return _blend(images, _gray(images).mean(dim=(-3, -2, -1), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from each pixel's gray, and clip."""
    return _blend(images, _gray(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` (a share of the whole turn), through HSV."""
    hue, saturation, value = _rgb_to_hsv(images)
    return _hsv_to_rgb((hue + _per_image(shift)[:, 0]) % 1.0, saturation, value)


def grayscale(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    return _gray(images).expand_as(images)


def blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with each image's own sigma (0: none), reflecting at the border."""
    if kernel_size == 1:
        return images
    radius = kernel_size // 2
    if radius >= min(images.shape[-2:]):
        raise ValueError(
            f"a blur kernel of {kernel_size} pixels needs an image larger than {radius}, got {tuple(images.shape[-2:])}"
        )
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    safe = torch.where(sigma > 0.0, sigma, torch.ones_like(sigma))
    weights = torch.exp(-0.5 * (offsets / safe[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    num, channels, height, width = images.shape
    kernels = weights.repeat_interleave(channels, 0)
    padded = pad(images, [radius] * 4, mode="reflect").reshape(
        1, num * channels, height + 2 * radius, width + 2 * radius
    )
    blurred = conv2d(padded, kernels[:, None, None, :], groups=num * channels)
    blurred = conv2d(blurred, kernels[:, None, :, None], groups=num * channels)
    return torch.where(_per_image(sigma > 0.0), blurred.reshape(images.shape), images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above each image's threshold."""
    return torch.where(images >= _per_image(threshold), 1.0 - images, images)


def rotate(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Counter-clockwise by each image's own number of quarter turns; images are square."""
    for turns in (1, 2, 3):
        images = torch.where(_per_image(quarter_turns == turns), images.rot90(turns, (-2, -1)), images)
    return images


def sobel(images: Tensor) -> Tensor:
    """The magnitude of the luma's gradient by Sobel's 3×3 kernels, reflecting at the border, clipped, thrice."""
    smooth = torch.tensor([1.0, 2.0, 1.0], device=images.device, dtype=images.dtype)
    slope = torch.tensor([-1.0, 0.0, 1.0], device=images.device, dtype=images.dtype)
    along_x = torch.outer(smooth, slope)
    kernels = torch.stack([along_x, along_x.T])[:, None]
    gradient = conv2d(pad(_gray(images), [1] * 4, mode="reflect"), kernels)
    return gradient.square().sum(1, keepdim=True).sqrt().clamp(0.0, 1.0).expand_as(images)


def add_noise(images: Tensor, params: ViewParams) -> Tensor:
    """Gaussian noise of each image's own standard deviation and key, clipped to [0, 1] where there is any.

    Value i of an image, counted by rows, then columns, then channels, takes the Box–Muller transform of two 24-bit
    uniform numbers out of the 64-bit word `rng.bits(noise_key, i)`: u from its upper bits, in (0, 1], and w from the
    next, in [0, 1); √(−2 ln u) · cos(2π w).
    """
    num, channels, height, width = images.shape
    words = bits(params["noise_key"][:, None], np.arange(height * width * channels, dtype=np.uint64))
    u = ((words >> np.uint64(40)) + np.uint64(1)).astype(np.float64) * 2.0**-24
    w = ((words >> np.uint64(16)) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
    normal = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * w)
    noise_NHWC = (params["noise_std"][:, None] * normal).reshape(num, height, width, channels)
    noise = to_device(noise_NHWC, images.device).permute(0, 3, 1, 2).to(images.dtype)
    noisy = to_device(params["noise_std"] > 0.0, images.device)
    return torch.where(_per_image(noisy), (images + noise).clamp(0.0, 1.0), images)


def cutout(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, fill: tuple[float, float, float]
) -> Tensor:
    """Fill each image's own rectangle with one colour."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    channels = [plane.masked_fill(inside[:, 0], value) for plane, value in zip(images.unbind(1), fill, strict=True)]
    return torch.stack(channels, dim=1)


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(x − mean) / std by channel."""
    red, green, blue = images.unbind(-3)  # channel by channel: constants in the launch, no copy to the device
    channels = [(plane - m) / s for plane, m, s in zip((red, green, blue), mean, std, strict=True)]
    return torch.stack(channels, dim=-3)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device, without making the host wait for a GPU's queue."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(-3)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(-3)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return (factor * images + (1.0 - factor) * other).clamp(0.0, 1.0)


def _rgb_to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    red, green, blue = images.unbind(-3)
    high, low = images.amax(-3), images.amin(-3)
    spread = high - low
    gray = spread == 0.0
    divisor = torch.where(gray, torch.ones_like(spread), spread)
    saturation = spread / torch.where(gray, torch.ones_like(high), high)
    to_red, to_green, to_blue = (high - red) / divisor, (high - green) / divisor, (high - blue) / divisor
    sixths = torch.where(
        high == red,
        to_blue - to_green,
        torch.where(high == green, 2.0 + to_red - to_blue, 4.0 + to_green - to_red),
    )
    return (sixths / 6.0 + 1.0) % 1.0, saturation, high


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Each channel falls from `value` by its distance on the colour circle (the piecewise-linear form)."""
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue * 6.0) % 6.0
        channels.append(value - value * saturation * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=-3)


_JITTER_OPS = {
    BRIGHTNESS: adjust_brightness,
    CONTRAST: adjust_contrast,
    SATURATION: adjust_saturation,
    HUE: adjust_hue,
}
