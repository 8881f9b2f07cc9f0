"""The photometric chain in plain torch: the definition that the other implementations are held against.

Works on any device and in float32 or float64, over a batch whose images each have parameters of their own:
jitter (random order, clipped to [0, 1] after each operation) → gray → blur → solarize → normalise.

Each operation follows torchvision's functional one on float images (`adjust_brightness`, `adjust_contrast`,
`adjust_saturation`, `adjust_hue`, `rgb_to_grayscale`, `gaussian_blur`, `solarize`); random order and probabilities
are SimCLR's (v1, appendix A).

Legend: N images, H×W pixels; images are [N, 3, H, W] in [0, 1]; factors are [N].
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NUM_JITTER_OPS, SATURATION, ViewParams
from pipelines.recipe import Recipe, ViewRecipe

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

    if view.jitter_prob > 0.0:
        images = jitter(images, column("jitter_order"), column("jitter_factor").to(dtype))
    if view.gray_prob > 0.0:
        images = torch.where(_per_image(column("gray")), grayscale(images), images)
    if view.blur_prob > 0.0:
        images = blur(images, column("blur_sigma").to(dtype), view.blur_kernel)
    if view.solarize_prob > 0.0:
        images = solarize(images, column("solarize_threshold").to(dtype))
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
