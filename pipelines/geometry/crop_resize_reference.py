"""Crop and resize in plain torch, image by image: the definition, on any device.

Legend: N images, S the side of the view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.params import ViewParams
from pipelines.recipe import ViewRecipe


def crop_resize_reference(
    pixels: Tensor, offsets: Tensor, widths: Tensor, heights: Tensor, params: ViewParams, view: ViewRecipe
) -> Tensor:
    """Crops uint8 [N, 3, S, S], channels_last: arguments as `PackedImages` and `crop_resize` have them.

    Waits for the device.
    """
    size = view.size
    crops = [
        _crop(pixels[offset : offset + width * height * 3].view(height, width, 3), window, view)
        for offset, width, height, window in zip(
            offsets.tolist(), widths.tolist(), heights.tolist(), params, strict=True
        )
    ]
    out = torch.stack(crops) if crops else pixels.new_empty((0, 3, size, size))
    return out.contiguous(memory_format=torch.channels_last)


def _crop(image_HWC: Tensor, window: ViewParams, view: ViewRecipe) -> Tensor:
    top, left, height, width = (int(window[name]) for name in ("top", "left", "height", "width"))
    cut = image_HWC[top : top + height, left : left + width].permute(2, 0, 1)[None]
    resized = interpolate(cut.float(), [view.size] * 2, mode=view.interpolation, antialias=True, align_corners=False)
    rounded = (resized[0] + 0.5).clamp(0.0, 255.0).to(torch.uint8)  # the conversion truncates
    return rounded.flip(-1) if window["flip"] else rounded
