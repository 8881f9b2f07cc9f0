"""From a configuration to a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipelines.batch import Loader
from pipelines.beton import Beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how it is read."""

    path: str
    """The `.beton` file, made by `python -m tools.convert`."""
    global_batch_size: int = 256
    """Images (not views) in one optimizer step, over all ranks."""
    loader: Literal["ffcv"] = "ffcv"
    """`ffcv`: decodes on the CPU, on threads of its own."""
    num_threads: int = 0
    """Decoding threads of each rank; 0: the rank's share of the machine's cores."""
    batches_ahead: int = 2
    """Batches in the making while one is in use."""
    on_error: Literal["raise", "skip"] = "raise"
    """A sample that cannot be decoded stops the run, or is named, counted and replaced by its neighbour."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ValueError(f"`data.global_batch_size` must be at least 1, got {self.global_batch_size}")
        if self.num_threads < 0:
            raise ValueError(f"`data.num_threads` must be 0 (the rank's cores) or more, got {self.num_threads}")
        if self.batches_ahead < 1:
            raise ValueError(f"`data.batches_ahead` must be at least 1, got {self.batches_ahead}")


def build_loader(
    config: DataConfig,
    beton: Beton,
    recipe: Recipe,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    num_cores: int,
    training: bool = True,
) -> Loader:
    """The loader that `config` asks for.

    Args:
        config: the run's.
        beton: the open file.
        recipe: of the views.
        seed: of the order and of every view.
        rank: of this process.
        world_size: number of ranks.
        device: where views go.
        dtype: of the views.
        num_cores: this rank's share of the machine, for `num_threads: 0`.
        training: shuffle and drop the last partial global batch; else keep the file's order and every image.

    Raises:
        ValueError: when training, the batch does not divide among the ranks, or the file is smaller than one batch.
    """
    if training:
        check_batch_size(config.global_batch_size, world_size, beton.num_samples)
    return FFCVLoader(
        beton,
        recipe,
        seed=seed,
        global_batch_size=config.global_batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        dtype=dtype,
        num_threads=config.num_threads or num_cores,
        batches_ahead=config.batches_ahead,
        training=training,
        on_error=config.on_error,
    )


def check_batch_size(global_batch_size: int, world_size: int, num_samples: int) -> None:
    """Refuse a training batch that the ranks cannot share equally, or that the file cannot fill once.

    Raises:
        ValueError: with the nearest sizes that would do.
    """
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        near = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ValueError(
            f"`data.global_batch_size` must be divisible by world size {world_size}, got {global_batch_size}; "
            f"use {near}"
        )
    if global_batch_size > num_samples:
        raise ValueError(
            f"`data.global_batch_size` must not exceed the {num_samples} images of the file, got {global_batch_size}; "
            "use a smaller batch"
        )
