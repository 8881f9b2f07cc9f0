"""The images of a `.beton` under torch's DataLoader: for the peers whose transforms take one image at a time.

The images come from memory: files would only slow it down.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.two_views import Batches
from pipelines.beton import MODE_RAW, Beton, open_beton

Kind = Literal["pil", "tensor"]
MakeTwoViews = Callable[[Any], tuple[Tensor, Tensor]]


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Decodes a sample once, as a PIL image or a uint8 tensor, and makes two views of it."""

    def __init__(self, beton: Beton, kind: Kind, make_two_views: MakeTwoViews) -> None:
        self._beton, self._kind, self._make_two_views = beton, kind, make_two_views

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self._make_two_views(self._decode(i))

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


def data_loader(path: Path, kind: Kind, make_two_views: MakeTwoViews, batch_size: int, workers: int) -> Batches:
    """The loader; its worker processes start with the first turn and stay."""
    torch.set_num_threads(1)
    beton = open_beton(path)
    sampler = Cycle(beton.num_samples)
    loader = DataLoader(
        TwoViews(beton, kind, make_two_views),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",  # as in a user's process; this one would pass its own way of starting on
    )

    def batches(num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler.num_images = num_images
        yield from loader

    return batches


def twice(transform: Callable[[Any], Tensor]) -> MakeTwoViews:
    """One transform, drawn anew for each view."""
    return lambda image: (transform(image), transform(image))
