"""Our own contestant of the pipeline benchmarks; apart from them, since its process needs nothing of the peers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.two_views import Augment, Batches
from pipelines.batch import Batch, Loader
from pipelines.beton import Beton, open_beton
from pipelines.dali_loader import DALILoader
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe, ViewRecipe
from train.runtime import keep_freed_memory

EPOCH = 200_000  # images: as long as a large set's, so that its start and end weigh little
WARM_UP_BATCHES = 4


def twinview(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """The loader as training on the CPU uses it, or its crops as a GPU is sent them; channels_last."""
    prepare_process()
    beton = repeated(open_beton(path))
    return _batches(lambda: ffcv_loader(beton, augment, batch_size, workers), batch_size)


def twinview_dali(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """The loader that decodes and crops with DALI, on the CPU."""
    prepare_process()
    beton = repeated(open_beton(path))

    def make() -> DALILoader:
        return DALILoader(
            beton,
            _recipe(augment),
            seed=0,
            global_batch_size=batch_size,
            num_threads=workers,
            output=_output(augment),
        )

    return _batches(make, batch_size)


def prepare_process() -> None:
    """As the trainer does."""
    torch.set_num_threads(1)
    keep_freed_memory()


def ffcv_loader(beton: Beton, augment: Augment, batch_size: int, workers: int) -> FFCVLoader:
    """The loader over `beton` as it is."""
    return FFCVLoader(
        beton,
        _recipe(augment),
        seed=0,
        global_batch_size=batch_size,
        num_threads=workers,
        output=_output(augment),
    )


def _output(augment: Augment) -> Literal["views", "crops"]:
    """Without colours, what a GPU is sent."""
    return "views" if augment.color_strength else "crops"


def _batches(make: Callable[[], Loader], batch_size: int) -> Batches:
    all_batches = epochs_of(make, batch_size)

    def batches(num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in all_batches(num_images):
            first, second = batch.views
            yield first, second

    return batches


def epochs_of(make: Callable[[], Loader], batch_size: int) -> Callable[[int], Iterator[Batch]]:
    """What yields the batches of so many images, up to the end of an epoch, so that nothing is prefetched in vain."""
    warm = make()  # loads the compiled kernels; its threads and their memory are not what is measured
    for _ in warm.epoch(0, start_batch=len(warm) - WARM_UP_BATCHES):
        pass
    warm.close()
    loader = make()

    def batches(num_images: int) -> Iterator[Batch]:
        remaining = num_images // batch_size
        while remaining:
            num_batches = min(remaining, len(loader))
            yield from loader.epoch(0, start_batch=len(loader) - num_batches)
            remaining -= num_batches

    return batches


def _recipe(augment: Augment) -> Recipe:
    brightness, contrast, saturation, hue = augment.jitter
    has_colors = augment.color_strength > 0
    view = ViewRecipe(
        size=augment.size,
        crop_area=augment.crop_area,
        crop_aspect=augment.crop_aspect,
        flip_prob=0.5,
        jitter_prob=augment.jitter_prob if has_colors else 0.0,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        gray_prob=augment.gray_prob if has_colors else 0.0,
        blur_prob=augment.blur_prob if augment.blur else 0.0,
        blur_sigma=augment.blur_sigma,
    )
    return Recipe(views=(view, view))


def repeated(beton: Beton, num_samples: int = EPOCH) -> Beton:
    """The same images again and again, as one longer set."""
    rows = np.arange(num_samples) % beton.num_samples
    tables = {name: getattr(beton, name)[rows] for name in ("modes", "widths", "heights", "offsets", "sizes")}
    labels = None if beton.labels is None else beton.labels[rows]
    return dataclasses.replace(beton, num_samples=num_samples, labels=labels, **tables)
