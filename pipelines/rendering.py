"""Batches in the making: the kernels of `pipelines.decode`, run over the memory map by a pool of threads.

A batch is made in one flat host buffer, of which there are three kinds:

- `views`: finished, float32, for training on the CPU;
- `crops`: uint8, before the photometric chain: a quarter of the bytes, for a GPU that colours them;
- `images`: uint8, decoded and whole, for a GPU that crops them as well.

Legend: N local images, V views, S side of a view.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bad_samples import BadSamples
from pipelines.beton import Beton
from pipelines.beton_memory import check_images_fit
from pipelines.buffers import HostBuffers, check_batches_fit
from pipelines.decode.clock import DECODE, new_clock
from pipelines.decode.kernel import REFUSED, WRONG_SIZE, Coloring, Layout, Source, render_kernel, unpack_kernel
from pipelines.decode.resample import FILTERS
from pipelines.decode.turbojpeg import ANOTHER_SIZE, addresses, is_harmless
from pipelines.params import VIEW_PARAMS, ViewParams, recipe_table
from pipelines.pool import KEPT_PIXELS, DecodePool, Worker
from pipelines.recipe import Recipe
from pipelines.rng import key_of

Target = Literal["views", "crops", "images"]

CHUNKS_PER_THREAD = 4  # a batch in this many chunks a thread: enough for balance, few enough to cost nothing
MIN_CHUNK_PIXELS = 2**17  # of views: taking a chunk costs 40 µs under Python's lock, a pair of 32² views 8 µs in all


@dataclass
class Rendering:
    """A batch being made.

    Attributes:
        epoch: whose parameters it has.
        samples: int64 [N]; rows of the file.
        params: `VIEW_PARAMS` [N, V]; drawn by the threads.
        out: the flat buffer.
        starts: int64 [N]; where each image begins in the buffer; empty unless the target is `images`.
        tries: how many times the batch was begun.
        is_void: a whole image was replaced by one of another size, so that the buffer must be laid out anew.
        chunks: what the threads do.
        spent: nanoseconds in the parts of `pipelines.decode.clock`, an array for each call of the kernel, where the
            renderer has a clock.
    """

    epoch: int
    samples: NDArray[np.int64]
    params: ViewParams
    out: Tensor
    starts: NDArray[np.int64]
    tries: int
    is_void: bool = False
    chunks: list[Future[None]] = field(default_factory=list)
    spent: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def is_made(self) -> bool:
        """Whether all of it is there, and without an error."""
        return all(chunk.done() and chunk.exception() is None for chunk in self.chunks)

    def cancel(self) -> None:
        """Drop the chunks that have not begun."""
        for chunk in self.chunks:
            chunk.cancel()


class Renderer:
    """Makes batches on threads of its own.

    Args:
        beton: the open file.
        recipe: of the views.
        seed: of every view.
        target: what is made.
        num_threads: that decode.
        scaled_decode: decode JPEGs at half or quarter scale where no window becomes smaller than its view.
        pinned: whether the buffers are pinned, for copies to a GPU.
        bad_samples: what happens to them.
        by_image: an image's views lie side by side in the buffer, [N, V, S, S, 3] for views of one size; otherwise each
            view is a block of its own, V times [N, S, S, 3].

    Attributes:
        clock: `WALL` or `THREAD` of `pipelines.decode.clock`, by which the kernels' parts are timed; None: they are
            not. With a target of `images`, all counts as decoding.
    """

    def __init__(
        self,
        beton: Beton,
        recipe: Recipe,
        seed: int,
        *,
        target: Target,
        num_threads: int,
        scaled_decode: bool,
        pinned: bool,
        bad_samples: BadSamples,
        by_image: bool = False,
    ) -> None:
        self.beton, self.recipe, self.target = beton, recipe, target
        self._seed, self._num_threads, self._scaled_decode = seed, num_threads, scaled_decode
        self._bad_samples, self._by_image = bad_samples, by_image
        check_images_fit(beton, num_threads)
        self._table = recipe_table(recipe)
        self._sizes = np.array([view.size for view in recipe.views], np.int64)
        self._filters = np.array([FILTERS[view.interpolation] for view in recipe.views], np.int64)
        tables = (beton.offsets, beton.sizes, beton.modes, beton.widths, beton.heights)
        self._source = Source(beton.data, *map(np.ascontiguousarray, tables))
        self._num_pixels = beton.widths.astype(np.int64) * beton.heights
        self._largest = int(self._num_pixels.max()), int(max(beton.widths.max(), beton.heights.max()))
        self._coloring = _coloring(recipe) if target == "views" else None
        self._buffers = HostBuffers(np.float32 if target == "views" else np.uint8, pinned=pinned)
        self._pool = DecodePool(num_threads, [view.size for view in recipe.views], int(self._filters.max()))
        self._is_closed = False
        self.clock: int | None = None
        self._turbojpeg = addresses()
        self._kernel = unpack_kernel() if target == "images" else render_kernel()

    def start(self, epoch: int, samples: NDArray[np.int64], out: Tensor | None = None, *, tries: int = 1) -> Rendering:
        """Begin a batch.

        Args:
            epoch: whose parameters it gets.
            samples: int64 [N], rows of the file; the batch's own from now on.
            out: the flat buffer; by default one that is free.
            tries: counts how many times the batch was begun.

        Raises:
            ValueError: the file was changed since it was opened.
        """
        self._check_open()
        self.beton.check_unchanged()
        num = len(samples)
        if self.target == "images":
            lengths = 3 * self._num_pixels[samples]
            starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
            if total > 2 * self.batch_bytes(num):  # than was reckoned with
                check_batches_fit(self.recipe, num, 1, bytes_per_number=1, batch_bytes=total)
        else:
            starts, total = np.zeros(0, np.int64), int(self.block_sizes(num).sum())
        rendering = Rendering(
            epoch=epoch,
            samples=samples,
            params=np.zeros((num, len(self._sizes)), VIEW_PARAMS),
            out=self._buffers.take(total) if out is None else out,
            starts=starts,
            tries=tries,
        )
        size = self._chunk_size(num)
        for begin in range(0, num, size):
            work = partial(self._make, rendering, begin, min(begin + size, num))
            rendering.chunks.append(self._pool.submit(work))
        return rendering

    def wait(self, rendering: Rendering) -> Rendering:
        """The batch once it is made.

        Raises:
            ValueError: a sample cannot be decoded, and is named; or the file was changed since it was opened.
        """
        self._check_open()
        try:
            for chunk in rendering.chunks:
                chunk.result()
        finally:  # else the blame would fall on a sample, or on nobody
            self.beton.check_unchanged()
        if rendering.is_void:
            return self.wait(self.start(rendering.epoch, rendering.samples, tries=rendering.tries + 1))
        return rendering

    def batch_bytes(self, num_images: int) -> int:
        """Bytes that a batch takes; of whole images, on average."""
        if self.target == "images":
            return int(3 * self._num_pixels.mean() * num_images)
        return int(self.block_sizes(num_images).sum()) * (4 if self.target == "views" else 1)

    def block_sizes(self, num_images: int) -> NDArray[np.int64]:
        """Numbers that each view of all images takes in the buffer, int64 [V]."""
        return self._sizes**2 * 3 * num_images

    def views(self, rendering: Rendering, out: Tensor) -> list[Tensor]:
        """The views in `out`, the buffer of a batch or its copy: V tensors [N, 3, S, S], channels_last."""
        num = len(rendering.samples)
        blocks = torch.split(out, self.block_sizes(num).tolist())
        return [
            block.view(num, size, size, 3).permute(0, 3, 1, 2)
            for block, size in zip(blocks, self._sizes.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Stop the threads and free their memory."""
        self._is_closed = True
        self._pool.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the loader is closed; make another one")

    def _chunk_size(self, num_images: int) -> int:
        """Images that a thread takes at a time."""
        balanced = -(-num_images // (self._num_threads * CHUNKS_PER_THREAD))
        worthwhile = -(-MIN_CHUNK_PIXELS // int((self._sizes**2).sum()))
        return max(1, balanced, min(worthwhile, -(-num_images // self._num_threads)))

    def _make(self, rendering: Rendering, begin: int, end: int, worker: Worker) -> None:
        """Make positions [begin, end) of a batch, on a decoding thread."""
        tries = 0
        while begin < end:
            stop, status = self._run(rendering, begin, end, worker, tolerant=False)
            if stop == end:
                return
            reason = ANOTHER_SIZE if status == WRONG_SIZE else worker.decompressor.last_error()
            if status == REFUSED and is_harmless(reason, self.beton.encoded(int(rendering.samples[stop]))):
                self._run(rendering, stop, stop + 1, worker, tolerant=True)
                begin, tries = stop + 1, 0
                continue
            tries = tries + 1 if stop == begin else 1
            bad = int(rendering.samples[stop])
            rendering.samples[stop] = self._bad_samples.replace(bad, reason, max(tries, rendering.tries))
            begin = stop
            if self.target == "images":  # the next turn of the whole batch tries the row that stands in
                rendering.is_void = True
                begin, tries = stop + 1, 0

    def _run(self, rendering: Rendering, begin: int, end: int, worker: Worker, *, tolerant: bool) -> tuple[int, int]:
        """Call the kernel: the position where it stopped, and why."""
        samples = rendering.samples[begin:end]
        scratch = worker.scratch(*(self._largest if self._largest[0] <= KEPT_PIXELS else self._needed(samples)))
        native = (self._turbojpeg, worker.decompressor.handles, scratch)
        epoch_key, out = key_of(self._seed, rendering.epoch)[0], rendering.out.numpy()
        common = (self._source, rendering.samples, self._table, epoch_key, rendering.params, begin, end)
        clock = None if self.clock is None else new_clock(self.clock)
        if self.target == "images":
            began = 0 if clock is None else time.clock_gettime_ns(clock.kind)
            stop, status = self._kernel(*common, tolerant, *native, rendering.starts, out)
            if clock is not None:
                clock.spent[DECODE] = time.clock_gettime_ns(clock.kind) - began
        else:
            layout = self._layout(len(rendering.samples))
            stop, status = self._kernel(
                *common, tolerant, self._scaled_decode, *native, layout, self._coloring, out, clock
            )
        if clock is not None:
            rendering.spent.append(clock.spent)
        return int(stop), int(status)

    def _layout(self, num_images: int) -> Layout:
        lengths = self.block_sizes(1)
        blocks = lengths if self._by_image else self.block_sizes(num_images)
        strides = np.full_like(lengths, lengths.sum()) if self._by_image else lengths
        return Layout(sizes=self._sizes, offsets=np.cumsum(blocks) - blocks, strides=strides, filters=self._filters)

    def _needed(self, samples: NDArray[np.int64]) -> tuple[int, int]:
        widths, heights = self._source.widths[samples], self._source.heights[samples]
        return int(self._num_pixels[samples].max()), int(max(widths.max(), heights.max()))


def _coloring(recipe: Recipe) -> Coloring:
    return Coloring(
        kernel_sizes=np.array([view.blur_kernel for view in recipe.views], np.int64),
        mean=np.array(recipe.mean, np.float32),
        std=np.array(recipe.std, np.float32),
    )
