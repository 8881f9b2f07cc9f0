"""The loader for plain folders: torchvision's way, with our parameters.

For trying without converting, and as the slow, obvious check of the other loaders. A torch `DataLoader` runs
`pipelines.folder_dataset` in processes, which decodes with Pillow and cuts the drawn windows with torchvision's
antialiased resize; the photometric chain colours whole batches. Seed, epoch and sample give the views that they give
in the other loaders from the same pixels: from a `.beton` that `tools.convert --encode keep` made of the folder, crops
are equal to within one level of 255.

Samples and labels are those of `torchvision.datasets.ImageFolder`, which knows images by their suffix. Images alone,
without class folders, are taken by name and have the label −1. A file is what Pillow's `convert("RGB")` makes of it, as
with torchvision. That differs from a converted set where a file is not plain 8-bit RGB or gray: EXIF orientation is not
applied, transparency is dropped, 16-bit gray is clipped to 8 bits, and CMYK is converted without a profile.

Legend: N local images, V views, S side of a view.
"""

from __future__ import annotations

import contextlib
import os
import signal
import zlib
from collections.abc import Iterator
from functools import cached_property
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pipelines.bad_samples import BadSamples, OnError
from pipelines.batch import Batch
from pipelines.buffers import check_batches_fit
from pipelines.folder_dataset import CropDataset, Crops
from pipelines.photometric.chain import photometric_chain
from pipelines.photometric.reference import to_device
from pipelines.plan import NUM_FINGERPRINTED, BatchPlan
from pipelines.recipe import Recipe


class FolderLoader:
    """Yields batches of views from a folder of images; implements `pipelines.batch.Loader`.

    Args:
        root: class folders, or images alone.
        recipe: of the views.
        seed: of the order and of every view.
        global_batch_size: images over all ranks; divisible by `world_size` when training.
        rank: of this process.
        world_size: number of ranks.
        device: where views go.
        dtype: of the views.
        num_workers: processes that decode and cut; 0: this one.
        batches_ahead: batches in the making while one is in use.
        training: shuffle and drop the last partial global batch; else keep the order and every image.
        rows: int64, rising: those of the folder's images, in torchvision's order, that are used; None: all.
        labels: int64, of every image, in the place of those of the class folders; None: those.
        on_error: `raise` stops at an image that cannot be decoded; `skip` names it, counts it, and uses its neighbour.

    Raises:
        OSError: there is no such folder, or a class folder is empty.
        ValueError: there are no images.
    """

    def __init__(
        self,
        root: str | Path,
        recipe: Recipe,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 0,
        batches_ahead: int = 2,
        training: bool = True,
        rows: NDArray[np.int64] | None = None,
        labels: NDArray[np.int64] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.recipe, self.seed, self.dtype = recipe, seed, dtype
        self.device = device or torch.device("cpu")
        self.dataset = CropDataset(Path(root), recipe, seed)
        if labels is not None:
            self.dataset.labels = labels
        self.plan = BatchPlan(
            num_samples=len(self.dataset),
            fingerprint=folder_fingerprint(self.dataset),
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            training=training,
            rows=rows,
        )
        local_batch_size = -(-min(global_batch_size, self.plan.num_samples) // world_size)
        check_batches_fit(recipe, local_batch_size, batches_ahead + 6, bytes_per_number=1)
        files = self.dataset.files
        self._bad_samples = BadSamples(len(files), lambda row: f"sample {row} ({files[row]})", on_error, rows=rows)
        self._num_workers, self._batches_ahead = num_workers, batches_ahead
        self._addresses = _Addresses()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.plan)

    @property
    def num_skipped(self) -> int:
        """Images that could not be decoded and were replaced."""
        return self._bad_samples.num_skipped

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on."""
        batches = range(start_batch, len(self))
        samples = [self.plan.samples(epoch, batch) for batch in batches]
        self._addresses.epoch, self._addresses.samples = epoch, samples
        with _stop_signals_blocked():
            crops_of_batches = iter(self._data_loader)
        for batch, rows, crops in zip(batches, samples, crops_of_batches, strict=True):
            for position in range(len(rows)):
                self._replace(crops, epoch, rows, position)
            self.plan.record(epoch, batch)
            yield self._finish(crops, epoch, rows)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position; see `BatchPlan.load_state_dict`."""
        return self.plan.load_state_dict(state)

    def close(self) -> None:
        """End the processes."""
        self.__dict__.pop("_data_loader", None)

    @cached_property
    def _data_loader(self) -> DataLoader[Crops]:
        """Made for the first batch, and kept: its processes take seconds to start."""
        several = self._num_workers > 0
        return DataLoader(
            self.dataset,
            batch_sampler=self._addresses,
            collate_fn=self.dataset.collate,
            num_workers=self._num_workers,
            prefetch_factor=max(1, -(-self._batches_ahead // self._num_workers)) if several else None,
            multiprocessing_context="forkserver" if several else None,  # this process has threads
            persistent_workers=several,
            pin_memory=self.device.type == "cuda",
        )

    def _replace(self, crops: Crops, epoch: int, rows: NDArray[np.int64], position: int) -> None:
        """If the image there cannot be decoded: raise, or put the next one in its place."""
        reason, tries = crops.reasons[position], 0
        while reason is not None:
            tries += 1
            rows[position] = neighbour = self._bad_samples.replace(int(rows[position]), reason, tries)
            stand_in = self.dataset[epoch, neighbour]
            reason = stand_in.reasons[0]
            crops.params[position] = stand_in.params[0]
            for view, its_view in zip(crops.views, stand_in.views, strict=True):
                view[position] = its_view[0]

    def _finish(self, crops: Crops, epoch: int, rows: NDArray[np.int64]) -> Batch:
        """Colour a batch on the device."""
        views = []
        for v, view in enumerate(self.recipe.views):
            images = crops.views[v].to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            views.append(photometric_chain(images, crops.params[:, v], view, self.recipe, self.dtype))
        labels = to_device(self.dataset.labels[rows], self.device)
        return Batch(views=views, labels=labels, sample_indices=torch.from_numpy(rows), epoch=epoch)


class _Addresses:
    """What the DataLoader is to make next: a batch is a list of `(epoch, sample)`."""

    def __init__(self) -> None:
        self.epoch = 0
        self.samples: list[NDArray[np.int64]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self.samples:
            yield [(self.epoch, sample) for sample in rows.tolist()]

    def __len__(self) -> int:
        return len(self.samples)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes that start meanwhile never hear of them; this one does afterwards.

    A Ctrl-C, Slurm and torchrun signal whole groups of processes. Who asks a run to stop asks this process, which still
    needs those that decode for the step that it is in.
    """
    resource_tracker.ensure_running()  # at its own start it unblocks signals that were blocked before
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def folder_fingerprint(dataset: CropDataset) -> str:
    """Checksum of the files' names below their folder and of some of their bytes: tells two sets apart quickly."""
    crc = zlib.crc32(dataset.labels.tobytes())
    for file in dataset.files:
        crc = zlib.crc32(os.fsencode(Path(file).name), crc)
    for sample in np.linspace(0, len(dataset) - 1, NUM_FINGERPRINTED).astype(np.int64).tolist():
        with contextlib.suppress(OSError):  # named when its turn comes
            crc = zlib.crc32(Path(dataset.files[sample]).read_bytes(), crc)
    return f"{crc:08x}"
