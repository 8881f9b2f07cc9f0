"""The loader for `.beton` files on the CPU: one decode an image, all views from it, on threads of its own.

It reads FFCV's format and decodes with FFCV's libjpeg-turbo, and drives its own kernel over the memory map. The views
of a sample do not depend on the batch, the rank or the thread that made it. For CPU training the threads also apply
the photometric chain; for a GPU they cut uint8 crops, a quarter of the bytes, and the chain runs on the device.

Legend: N local images, V views, S side of a view.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bad_samples import BadSamples, OnError
from pipelines.batch import Batch
from pipelines.beton import Beton
from pipelines.decode.kernel import REFUSED, WRONG_SIZE, Coloring, Layout, Source, render_kernel
from pipelines.decode.turbojpeg import HARMLESS_WARNING, addresses
from pipelines.params import ViewParams, draw_views
from pipelines.photometric.reference import photometric, to_device
from pipelines.plan import BatchPlan, beton_fingerprint
from pipelines.pool import DecodePool, Worker
from pipelines.recipe import Recipe

CHUNKS_PER_THREAD = 4  # a batch in this many chunks a thread: enough for balance, few enough to cost nothing


@dataclass
class _InFlight:
    """A batch being made."""

    samples: NDArray[np.int64]
    params: ViewParams
    source: Source
    out: Tensor
    chunks: list[Future[None]]


class FFCVLoader:
    """Yields batches of views from a `.beton`; implements `pipelines.batch.Loader`.

    Args:
        beton: the open file.
        recipe: of the views.
        seed: of the order and of every view.
        global_batch_size: images over all ranks; divisible by `world_size` when training.
        rank: of this process.
        world_size: number of ranks.
        device: where views go.
        dtype: of the views.
        num_threads: that decode.
        batches_ahead: batches in flight beside the one in use, at least 1.
        training: shuffle and drop the last partial global batch; else keep the file's order and every image.
        on_error: `raise` stops at a sample that cannot be decoded; `skip` names it, counts it, and uses its neighbour.
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
        num_threads: int = 1,
        batches_ahead: int = 2,
        training: bool = True,
        on_error: OnError = "raise",
    ) -> None:
        self.beton, self.recipe, self.seed = beton, recipe, seed
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self._plan = BatchPlan(
            num_samples=beton.num_samples,
            fingerprint=beton_fingerprint(beton),
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            training=training,
        )
        self._bad_samples = BadSamples(beton, on_error)
        self._batches_ahead, self._num_threads = batches_ahead, num_threads
        self._sizes = np.array([view.size for view in recipe.views], np.int64)
        self._pool = DecodePool(num_threads, [view.size for view in recipe.views])
        self._turbojpeg = addresses()
        self._render_chunk = render_kernel()
        self._coloring = self._coloring_on_cpu() if self.device.type == "cpu" else None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._plan)

    @property
    def num_skipped(self) -> int:
        """Samples that could not be decoded and were replaced."""
        return self._bad_samples.num_skipped

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on."""
        batches = range(start_batch, len(self))
        in_flight: deque[_InFlight] = deque()
        try:
            for batch in batches:
                while len(in_flight) <= self._batches_ahead and batch + len(in_flight) < len(self):
                    in_flight.append(self._start(epoch, batch + len(in_flight)))
                current = in_flight.popleft()
                for chunk in current.chunks:
                    chunk.result()
                self._plan.record(epoch, batch)
                yield self._finish(current, epoch)
        finally:
            for abandoned in in_flight:
                for chunk in abandoned.chunks:
                    chunk.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""
        return self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position; see `BatchPlan.load_state_dict`."""
        return self._plan.load_state_dict(state)

    def close(self) -> None:
        """Stop the threads and free their memory."""
        self._pool.close()

    def _coloring_on_cpu(self) -> Coloring:
        return Coloring(
            kernel_sizes=np.array([view.blur_kernel for view in self.recipe.views], np.int64),
            mean=np.array(self.recipe.mean, np.float32),
            std=np.array(self.recipe.std, np.float32),
        )

    def _start(self, epoch: int, batch: int) -> _InFlight:
        """Draw the parameters of a batch and queue its chunks."""
        samples = self._plan.samples(epoch, batch)
        beton = self.beton
        source = Source(
            data=beton.data,
            offsets=beton.offsets[samples],
            sizes=beton.sizes[samples],
            modes=beton.modes[samples],
            widths=beton.widths[samples],
            heights=beton.heights[samples],
        )
        params = draw_views(self.recipe, self.seed, epoch, samples, source.widths, source.heights)
        layout = self._layout(len(samples))
        total = int((self._sizes**2).sum()) * 3 * len(samples)
        on_cpu = self._coloring is not None
        out = torch.empty(total, dtype=torch.float32 if on_cpu else torch.uint8, pin_memory=not on_cpu)
        current = _InFlight(samples, params, source, out, [])
        size = max(1, -(-len(samples) // (self._num_threads * CHUNKS_PER_THREAD)))
        for begin in range(0, len(samples), size):
            end = min(begin + size, len(samples))
            current.chunks.append(self._pool.submit(partial(self._render, current, layout, epoch, begin, end)))
        return current

    def _layout(self, num_images: int) -> Layout:
        blocks = self._sizes**2 * 3 * num_images
        return Layout(sizes=self._sizes, offsets=np.cumsum(blocks) - blocks)

    def _render(self, current: _InFlight, layout: Layout, epoch: int, begin: int, end: int, worker: Worker) -> None:
        """Make positions [begin, end) of a batch, on a decoding thread."""
        source, out = current.source, current.out.numpy()

        def run(first: int, last: int, *, tolerant: bool) -> tuple[int, int]:
            widths, heights = source.widths[first:last].astype(np.int64), source.heights[first:last]
            scratch = worker.scratch(int((widths * heights).max()), int(max(widths.max(), heights.max())))
            stop, status = self._render_chunk(
                source,
                current.params,
                first,
                last,
                tolerant,
                self._turbojpeg,
                worker.decompressor.handle,
                scratch,
                layout,
                self._coloring,
                out,
            )
            return int(stop), int(status)

        tries = 0
        while begin < end:
            stop, status = run(begin, end, tolerant=False)
            if stop == end:
                return
            reason = (
                "its size is not the one in the file's table"
                if status == WRONG_SIZE
                else worker.decompressor.last_error()
            )
            if status == REFUSED and HARMLESS_WARNING in reason:
                run(stop, stop + 1, tolerant=True)
                begin = stop + 1
                continue
            tries = tries + 1 if stop == begin else 1
            self._on_bad_sample(current, epoch, stop, reason, tries)
            begin = stop

    def _on_bad_sample(self, current: _InFlight, epoch: int, position: int, reason: str, tries: int) -> None:
        """Raise, or put the next row of the file in the place of a sample that cannot be decoded."""
        neighbour = self._bad_samples.replace(int(current.samples[position]), reason, tries)
        current.samples[position] = neighbour
        for name in ("offsets", "sizes", "modes", "widths", "heights"):
            getattr(current.source, name)[position] = getattr(self.beton, name)[neighbour]
        here = slice(position, position + 1)
        current.params[here] = draw_views(
            self.recipe,
            self.seed,
            epoch,
            current.samples[here],
            current.source.widths[here],
            current.source.heights[here],
        )

    def _finish(self, done: _InFlight, epoch: int) -> Batch:
        """Hand a batch over, on the device."""
        num = len(done.samples)
        layout = self._layout(num)
        views = []
        for v, view in enumerate(self.recipe.views):
            size, start = view.size, int(layout.offsets[v])
            block = done.out[start : start + num * size * size * 3].view(num, size, size, 3).permute(0, 3, 1, 2)
            if self._coloring is None:
                block = photometric(block.to(self.device, non_blocking=True), done.params[:, v], view, self.recipe)
            views.append(block.to(self.dtype))
        labels = self.beton.labels
        return Batch(
            views=views,
            labels=to_device(np.full(num, -1) if labels is None else labels[done.samples], self.device),
            sample_indices=torch.from_numpy(done.samples),
            epoch=epoch,
        )
