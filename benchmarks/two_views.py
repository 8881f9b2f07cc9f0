"""What the contestants of the pipeline benchmarks have in common: the recipe, and batches of two views.

A contestant is a function `make(path, augment, batch_size, workers)` that opens a `.beton` and returns `Batches`. All
read the same stored bytes from the memory map; where a program has no reader of its own for the file, the bytes are
handed to it in place.

Shapes: N images of a batch, S side of a view.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.contestant import Run

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Yields the batches of so many images, a multiple of the batch size; each is two views [N, 3, S, S] of its images.

They may be overwritten by later batches.
"""
MakeBatches = Callable[[Path, "Augment", int, int], Batches]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Crop and flip, or SimCLR's whole recipe (v1, appendix A).

    Without colours the views are uint8, as they are sent to a GPU that does the rest; with them float32 in [0, 1].
    """

    size: int
    """Side of the views, pixels."""
    color_strength: float = 0.0
    """SimCLR's s; 0 leaves jitter and gray out."""
    blur: bool = False
    """Whether half of the views are blurred, σ from U[0.1, 2]."""

    crop_area = (0.08, 1.0)
    crop_aspect = (3 / 4, 4 / 3)
    jitter_prob = 0.8
    gray_prob = 0.2
    blur_prob = 0.5
    blur_sigma = (0.1, 2.0)

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """Brightness, contrast, saturation, hue, as torchvision's ColorJitter takes them."""
        s = self.color_strength
        return (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)

    @property
    def blur_kernel(self) -> int:
        """Width of the blur's kernel: a tenth of the side, made odd."""
        return 2 * (self.size // 10 // 2) + 1


def consume(make: MakeBatches, path: Path, augment: Augment, batch_size: int, workers: int) -> Run:
    """Set a contestant up; its run makes batches and drops them."""
    batches = make(path, augment, batch_size, workers)

    def run(num_images: int) -> None:
        deque(batches(num_images), maxlen=0)

    return run
