"""Our own contestant of the pipeline benchmarks; apart from them, since its process needs nothing of the peers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.contestant import Run
from pipelines.augment import AugmentConfig, build_recipe, supervised_view
from pipelines.beton import Beton, open_beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe
from train.runtime import keep_freed_memory

EPOCH = 20_000  # images: as long as a large set's, so that its start and end weigh little
WARM_UP_BATCHES = 4

RecipeName = Literal["crop", "simclr", "simclr_cifar"]


def twinview(path: Path, recipe: RecipeName, size: int, batch_size: int, workers: int) -> Run:
    """The loader as training on the CPU uses it: two views, float32 in [0, 1], channels_last."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    beton = _repeated(open_beton(path), EPOCH)

    def make() -> FFCVLoader:
        views = _recipe(recipe, size)
        return FFCVLoader(beton, views, seed=0, global_batch_size=batch_size, num_threads=workers)

    warm = make()  # loads the compiled kernels; its threads and their memory are not what is measured
    for _ in warm.epoch(0, start_batch=len(warm) - WARM_UP_BATCHES):
        pass
    warm.close()
    loader = make()

    def run(num_images: int) -> None:
        remaining = num_images // batch_size
        while remaining:
            batches = min(remaining, len(loader))
            # Up to the end of the epoch, so that nothing is prefetched in vain.
            for _ in loader.epoch(0, start_batch=len(loader) - batches):
                pass
            remaining -= batches

    return run


def _recipe(name: RecipeName, size: int) -> Recipe:
    if name == "crop":
        return Recipe(views=(supervised_view(AugmentConfig(size=size)),) * 2)
    if name == "simclr_cifar":
        return build_recipe(AugmentConfig(size=size, color_strength=0.5, blur_prob=0.0))
    return build_recipe(AugmentConfig(size=size))


def _repeated(beton: Beton, num_samples: int) -> Beton:
    """The same images again and again, as one longer set."""
    rows = np.arange(num_samples) % beton.num_samples
    tables = {name: getattr(beton, name)[rows] for name in ("modes", "widths", "heights", "offsets", "sizes")}
    labels = None if beton.labels is None else beton.labels[rows]
    return dataclasses.replace(beton, num_samples=num_samples, labels=labels, **tables)
