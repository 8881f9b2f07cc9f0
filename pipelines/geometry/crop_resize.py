"""Crop windows of decoded images and resize them, on the device that holds the images: the entry and its choice.

The same crops as `pipelines.decode.resample` cuts on the CPU: each window is cut first, resized by an antialiased
triangle or cubic filter as torchvision's `resized_crop(antialias=True)`, rounded once, and mirrored where asked. They
are what `pipelines.photometric.chain` takes, so that nothing returns to the host.

Legend: N images, S the side of the view.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.geometry.crop_resize_reference import crop_resize_reference
from pipelines.params import VIEW_PARAMS, ViewParams
from pipelines.recipe import ViewRecipe

Backend = Literal["auto", "reference", "triton"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedImages:
    """Images of any sizes in one block of memory; all four tensors on one device."""

    pixels: Tensor
    """uint8, one-dimensional: RGB, row after row, one image after another; images may share it."""
    offsets: Tensor
    """int64 [N]: where each image begins in `pixels`."""
    widths: Tensor
    """int32 [N], pixels."""
    heights: Tensor
    """int32 [N], pixels."""

    def __post_init__(self) -> None:
        num = self.offsets.shape
        for name, dtype, shape in (
            ("pixels", torch.uint8, self.pixels.shape[:1]),
            ("offsets", torch.int64, num[:1]),
            ("widths", torch.int32, num),
            ("heights", torch.int32, num),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape or tensor.device != self.pixels.device:
                raise ValueError(
                    f"`{name}` of packed images must be {dtype} {list(shape)} on {self.pixels.device}, got "
                    f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )


def crop_resize(images: PackedImages, params: ViewParams, view: ViewRecipe, backend: Backend = "auto") -> Tensor:
    """Cut each image's window, resize it to the view's size, and mirror it where the flip was drawn.

    Args:
        images: N images.
        params: `VIEW_PARAMS` [N], on the host; their windows lie within the images.
        view: its size and interpolation.
        backend: "reference" (torch, any device, image by image) or "triton" (CUDA); "auto" takes triton on a GPU.

    Returns:
        uint8 [N, 3, S, S] in channels_last memory, on the images' device.

    Raises:
        ValueError: parameters or a backend that do not fit.
    """
    if params.dtype != VIEW_PARAMS or params.shape != images.offsets.shape:
        raise ValueError(f"`params` must be VIEW_PARAMS [{len(images.offsets)}], one an image, got {params.shape}")
    device = images.pixels.device.type
    if backend == "auto":
        backend = _choose(device)
    if backend == "reference":
        return crop_resize_reference(images.pixels, images.offsets, images.widths, images.heights, params, view)
    if backend == "triton":
        if device != "cuda":
            raise ValueError(f"`backend` 'triton' works on CUDA tensors, got {images.pixels.device}; use 'reference'")
        from pipelines.geometry.crop_resize_triton import crop_resize_triton

        return crop_resize_triton(images.pixels, images.offsets, images.widths, params, view)
    raise ValueError(f"`backend` must be 'auto', 'reference' or 'triton', got {backend!r}")


@functools.cache  # logged once for each device, not for every batch
def _choose(device: str) -> Backend:
    backend: Backend = "triton" if device == "cuda" else "reference"
    logger.info("crop and resize: %s (%s)", backend, device)
    return backend
