"""The loader for sets that fit into the device's memory: decoded once, when it is made, and nothing is loaded after.

All pixels lie in one uint8 tensor on the device. A batch is a set of offsets into it: windows are cut and resized where
the pixels lie, and coloured there. What travels in a step is the drawn parameters, and the host never waits for the
device. CIFAR-10 takes 150 MB so; photographs take three bytes a pixel, ten times their JPEGs. A set that does not fit
is refused before anything is allocated.

Views are those of `FFCVLoader`: the same windows and factors, crops equal to within one level of 255.

Legend: M images of the set, N images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bad_samples import BadSamples, OnError, bad_samples_of
from pipelines.batch import Batch
from pipelines.beton import MODE_RAW, Beton
from pipelines.beton_memory import check_images_fit
from pipelines.buffers import check_batches_fit, free_host_memory
from pipelines.decode.turbojpeg import PIXEL_FORMAT_RGB, Decompressor
from pipelines.draw import draw_views
from pipelines.geometry.crop_resize import PackedImages, crop_resize
from pipelines.params import ViewParams
from pipelines.photometric.chain import photometric_chain
from pipelines.photometric.reference import to_device
from pipelines.plan import plan_of
from pipelines.recipe import Recipe

BLOCK_BYTES = 2**26  # decoded on the host at a time, then copied: the host need not hold the set
SAMPLES_PER_CHUNK = 64  # that a thread takes at a time
GIB = 2**30
SHARE_OF_MEMORY = 0.5  # that the set may take: activations, which come later, want theirs


class ResidentLoader:
    """Yields batches of views from pixels that lie on the device; implements `pipelines.batch.Loader`.

    Args:
        beton: the open file; all of it is decoded here.
        recipe: of the views.
        seed: of the order and of every view.
        global_batch_size: images over all ranks; divisible by `world_size` when training.
        rank: of this process.
        world_size: number of ranks; each holds the whole set.
        device: where the set and the views are.
        dtype: of the views.
        training: shuffle and drop the last partial global batch; else keep the file's order and every image.
        rows: int64, rising: those of the file's rows that are used, and decoded; None: all.
        num_threads: that decode, at the beginning.
        on_error: `raise` stops at a sample that cannot be decoded; `skip` names it, counts it, and uses its neighbour.

    Raises:
        ValueError: the set does not fit into the device's free memory, or a sample cannot be decoded.
    """

    def __init__(
        self,
        beton: Beton,
        recipe: Recipe,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        training: bool = True,
        rows: NDArray[np.int64] | None = None,
        num_threads: int = 1,
        on_error: OnError = "raise",
    ) -> None:
        self.beton, self.recipe, self.seed = beton, recipe, seed
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.plan = plan_of(
            beton,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            training=training,
            rows=rows,
        )
        self._bad_samples = bad_samples_of(beton, on_error, training=training, rows=rows)
        local_batch_size = -(-min(global_batch_size, self.plan.num_samples) // world_size)
        if self.device.type == "cpu":
            check_batches_fit(recipe, local_batch_size, 2, bytes_per_number=4)
        self._rows = np.arange(beton.num_samples) if rows is None else rows
        check_memory(beton, self.device, self._rows)
        check_images_fit(beton, num_threads)
        reader = _Reader(beton, self._rows, self._bad_samples)
        beton.check_unchanged()
        try:
            self._set: PackedImages | None = reader.pack(self.device, num_threads)
        finally:  # else the blame would fall on a sample, or on nobody
            beton.check_unchanged()
        self._stand_ins = reader.stand_ins
        labels = np.full(len(self._rows), -1) if beton.labels is None else beton.labels[self._rows]
        self._labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.plan)

    @property
    def num_skipped(self) -> int:
        """Samples that could not be decoded; each is replaced wherever it comes up."""
        return self._bad_samples.num_skipped

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on."""
        for batch in range(start_batch, len(self)):
            made = self._make(epoch, batch)
            self.plan.record(epoch, batch)
            yield made

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position; see `BatchPlan.load_state_dict`."""
        return self.plan.load_state_dict(state)

    def close(self) -> None:
        """Free the device's memory."""
        self._set = None

    def _make(self, epoch: int, batch: int) -> Batch:
        """Draw on the host; select, cut and colour on the device."""
        images, params, samples, rows = self.select(epoch, batch)
        views = []
        for v, view in enumerate(self.recipe.views):
            crops = crop_resize(images, params[:, v], view)
            views.append(photometric_chain(crops, params[:, v], view, self.recipe, self.dtype))
        return Batch(views=views, labels=self._labels[rows], sample_indices=torch.from_numpy(samples), epoch=epoch)

    def select(self, epoch: int, batch: int) -> tuple[PackedImages, ViewParams, NDArray[np.int64], Tensor]:
        """The images of a batch, their parameters [N, V], their rows in the file, and their places in the set."""
        if self._set is None:
            raise RuntimeError("the loader was closed, and its images are gone; make another one")
        places = self._stand_ins[np.searchsorted(self._rows, self.plan.samples(epoch, batch))]
        samples = self._rows[places]
        widths, heights = self.beton.widths[samples], self.beton.heights[samples]
        params = draw_views(self.recipe, self.seed, epoch, samples, widths, heights)
        rows = to_device(places, self.device)
        images = PackedImages(
            self._set.pixels, self._set.offsets[rows], self._set.widths[rows], self._set.heights[rows]
        )
        return images, params, samples, rows


def check_memory(beton: Beton, device: torch.device, rows: NDArray[np.int64]) -> None:
    """Refuse rows of a set, int64 [M], whose pixels do not fit into the device's memory beside the model.

    Raises:
        ValueError: with what is needed and what is free.
    """
    needed, free = int(_ends(beton, rows)[-1]), free_bytes(device)
    if needed > free * SHARE_OF_MEMORY:
        raise ValueError(
            f"`data.loader: resident` must fit into {SHARE_OF_MEMORY:.0%} of {device}'s free memory (the model has the "
            f"rest): the pixels of the {len(rows)} images of {beton.path} need {needed / GIB:.2f} GiB, "
            f"{free / GIB:.2f} GiB are free; use another loader, or convert with a smaller `--max-side`"
        )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can still be taken, what torch holds for its next tensors included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    return free_host_memory()


class _Reader:
    """Decodes a set.

    Args:
        beton: the file.
        rows: int64 [M], rising: those that are decoded.
        bad_samples: what happens to those that cannot be.

    Attributes:
        stand_ins: int64 [M]; the place among `rows` that is used for each, its own unless that cannot be decoded.
    """

    def __init__(self, beton: Beton, rows: NDArray[np.int64], bad_samples: BadSamples) -> None:
        self.stand_ins = np.arange(len(rows))
        self._beton, self._rows, self._bad_samples = beton, rows, bad_samples
        self._ends = _ends(beton, rows)
        self._begins = np.append(0, self._ends[:-1])
        self._reasons: dict[int, str] = {}  # by row of the file

    def pack(self, device: torch.device, num_threads: int) -> PackedImages:
        """All images on the device, in the order of the rows."""
        pixels = torch.empty(int(self._ends[-1]), dtype=torch.uint8, device=device)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as threads:
            begin = 0
            while begin < len(self._rows):
                end = int(np.searchsorted(self._begins, self._begins[begin] + BLOCK_BYTES))
                pixels[self._begins[begin] : self._ends[end - 1]] = self._decode_block(begin, end, threads)
                begin = end
        self._replace_bad_samples()
        return PackedImages(
            pixels,
            torch.from_numpy(self._begins).to(device),
            torch.from_numpy(self._beton.widths[self._rows]).to(device),
            torch.from_numpy(self._beton.heights[self._rows]).to(device),
        )

    def _decode_block(self, begin: int, end: int, threads: ThreadPoolExecutor) -> Tensor:
        """The pixels of places [begin, end), one after the other, uint8."""
        block = np.zeros(self._ends[end - 1] - self._begins[begin], np.uint8)
        firsts = range(begin, end, SAMPLES_PER_CHUNK)
        for _ in threads.map(partial(self._decode_chunk, block, begin, end), firsts):
            pass  # an exception comes out here
        return torch.from_numpy(block)

    def _decode_chunk(self, block: NDArray[np.uint8], begin: int, end: int, first: int) -> None:
        """Decode the images of a block from place `first` on into it, as many as a thread takes at a time."""
        beton, origin = self._beton, self._begins[begin]
        with closing(Decompressor()) as decompressor:
            for place in range(first, min(first + SAMPLES_PER_CHUNK, end)):
                i = int(self._rows[place])
                out = block[self._begins[place] - origin : self._ends[place] - origin]
                if beton.modes[i] == MODE_RAW:
                    out[:] = beton.encoded(i)
                    continue
                size = int(beton.widths[i]), int(beton.heights[i])
                if reason := decompressor.decompress(beton.encoded(i), *size, out, PIXEL_FORMAT_RGB):
                    self._reasons[i] = reason

    def _replace_bad_samples(self) -> None:
        """Raise, or choose the place that is used for each sample that could not be decoded."""
        for bad in sorted(self._reasons):
            sample, tries = bad, 0
            while sample in self._reasons:
                tries += 1
                sample = self._bad_samples.replace(sample, self._reasons[sample], tries)
            self.stand_ins[np.searchsorted(self._rows, bad)] = np.searchsorted(self._rows, sample)


def _ends(beton: Beton, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each image's pixels end, bytes, int64 [M]."""
    return np.cumsum(beton.widths[rows].astype(np.int64) * beton.heights[rows] * 3)
