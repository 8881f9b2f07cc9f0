"""Host memory for batches, used again once nobody holds a tensor of it.

Fresh memory costs a page fault for every 4 KiB: 294 an image for two views of 224² in float32, a quarter of the time
that it takes to decode and augment the image. A batch that somebody keeps is never overwritten.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from pipelines.recipe import Recipe

_IDLE = 2  # references to an array that no tensor shares: the list's, and that of the call which counts them


class HostBuffers:
    """Hands out flat tensors.

    Args:
        dtype: of the numbers.
        pinned: page-locked, for copies to a GPU; torch keeps those itself for the next use.
    """

    def __init__(self, dtype: DTypeLike, *, pinned: bool) -> None:
        self._dtype, self._pinned = np.dtype(dtype), pinned
        self._arrays: list[NDArray[np.generic]] = []

    def take(self, size: int) -> Tensor:
        """A tensor [size] of arbitrary content, which no living tensor overlaps."""
        if self._pinned:
            return torch.empty(size, dtype=getattr(torch, self._dtype.name), pin_memory=True)
        idle = [i for i in range(len(self._arrays)) if sys.getrefcount(self._arrays[i]) == _IDLE]
        for i in idle:
            if self._arrays[i].size >= size:
                return torch.from_numpy(self._arrays[i])[:size]
        for i in reversed(idle):
            del self._arrays[i]
        self._arrays.append(np.empty(size, self._dtype))
        return torch.from_numpy(self._arrays[-1])


def buffer_bytes(num_bytes: int, *, pinned: bool) -> int:
    """What a buffer of so many bytes takes: torch rounds pinned memory up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if pinned and num_bytes else num_bytes


def check_batches_fit(
    recipe: Recipe, num_images: int, num_batches: int, *, bytes_per_number: int, batch_bytes: int | None = None
) -> None:
    """Refuse batches that cannot fit into this machine's free memory.

    Args:
        recipe: of the views.
        num_images: of a batch.
        num_batches: that exist at a time.
        bytes_per_number: of the views.
        batch_bytes: what a batch takes, if it is not its views.

    Raises:
        ValueError: they cannot; one line.
    """
    if batch_bytes is None:
        batch_bytes = num_images * sum(3 * view.size**2 for view in recipe.views) * bytes_per_number
    needed, free = num_batches * batch_bytes, free_host_memory()
    if needed > free:
        raise ValueError(
            f"{num_batches} batches of {num_images} images with {len(recipe.views)} views need {needed / 1e9:.0f} GB "
            f"of memory, {free / 1e9:.0f} GB are free; use a smaller `data.global_batch_size`, fewer or smaller views, "
            "or a lower `data.batches_ahead`"
        )


def free_host_memory() -> int:
    """Bytes that this process can still take, by the machine's memory and by its control group's limit."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free
