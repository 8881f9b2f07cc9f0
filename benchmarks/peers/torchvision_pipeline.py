"""torchvision v2 with torch's DataLoader, as its documentation advises: on PIL images, or on tensors from its decoder.

The images come out of the same `.beton` as everyone's, from memory: files would only slow it down.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.contestant import Run
from pipelines.beton import MODE_RAW, Beton, open_beton

Kind = Literal["pil", "tensor"]


@dataclass(frozen=True, kw_only=True)
class Colors:
    """The colour part of a recipe; the defaults are none."""

    jitter: tuple[float, float, float, float] | None = None
    """Brightness, contrast, saturation, hue; applied with probability 0.8."""
    gray_prob: float = 0.0
    blur_kernel: int = 1
    """Pixels; applied with probability 0.5, σ from [0.1, 2]."""


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Decodes a sample once and makes two views of it."""

    def __init__(self, beton: Beton, kind: Kind, transform: v2.Compose) -> None:
        self._beton, self._kind, self._transform = beton, kind, transform

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self._decode(i)
        return self._transform(image), self._transform(image)

    def _decode(self, i: int) -> Any:
        encoded = self._beton.encoded(i)
        if self._kind == "pil" and self._beton.modes[i] != MODE_RAW:
            return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
        encoded = encoded.copy()  # a tensor must not lie on read-only memory
        if self._beton.modes[i] != MODE_RAW:
            return decode_jpeg(torch.from_numpy(encoded), mode=ImageReadMode.RGB)
        pixels = encoded.reshape(self._beton.heights[i], self._beton.widths[i], 3)
        return Image.fromarray(pixels) if self._kind == "pil" else torch.from_numpy(pixels).permute(2, 0, 1)


class Cycle(Sampler[int]):
    """Rows in the order of the file, again and again, `num_images` in all."""

    def __init__(self, num_rows: int) -> None:
        self.num_images, self._num_rows = num_rows, num_rows

    def __iter__(self) -> Iterator[int]:
        return (i % self._num_rows for i in range(self.num_images))


def two_views(size: int, colors: Colors) -> v2.Compose:
    """Crop, flip, colours, and float32 in [0, 1]."""
    steps: list[torch.nn.Module] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if colors.jitter:
        steps.append(v2.RandomApply([v2.ColorJitter(*colors.jitter)], p=0.8))
    if colors.gray_prob:
        steps.append(v2.RandomGrayscale(colors.gray_prob))
    if colors.blur_kernel > 1:
        steps.append(v2.RandomApply([v2.GaussianBlur(colors.blur_kernel, (0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def torchvision_loader(path: Path, kind: Kind, size: int, colors: Colors, batch_size: int, workers: int) -> Run:
    """The loader; its worker processes start with the first turn and stay."""
    torch.set_num_threads(1)
    beton = open_beton(path)
    sampler = Cycle(beton.num_samples)
    loader = DataLoader(
        TwoViews(beton, kind, two_views(size, colors)),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",  # as in a user's process; this one would pass its own way of starting on
    )

    def run(num_images: int) -> None:
        sampler.num_images = num_images
        deque(loader, maxlen=0)

    return run
