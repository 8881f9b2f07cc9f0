"""The loader for `.beton` files on the CPU: one decode an image, all views from it, on threads of its own.

It reads FFCV's format and decodes with FFCV's libjpeg-turbo, and drives its own kernel over the memory map. The views
of a sample do not depend on the batch, the rank or the thread that made it. For CPU training the threads also apply
the photometric chain. For a GPU they cut uint8 crops, or only decode, and the rest runs on the device.

Legend: N local images, V views, S side of a view.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bad_samples import OnError, bad_samples_of
from pipelines.batch import Batch
from pipelines.beton import MODE_RAW, Beton
from pipelines.buffers import buffer_bytes, check_batches_fit
from pipelines.geometry.crop_resize import PackedImages, crop_resize
from pipelines.photometric.chain import photometric_chain
from pipelines.photometric.reference import to_device
from pipelines.plan import plan_of
from pipelines.recipe import Recipe
from pipelines.rendering import Renderer, Rendering, Target
from pipelines.transfer import Sender, Sent


@dataclass
class _InFlight:
    """A batch that is being made or sent."""

    rendering: Rendering
    sent: Sent | None = None


Geometry = Literal["auto", "cpu", "device"]


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
        rows: int64, rising: those of the file's rows that are used; None: all.
        on_error: `raise` stops at a sample that cannot be decoded; `skip` names it, counts it, and uses its neighbour.
        scaled_decode: decode JPEGs at half or quarter scale where no window becomes smaller than its view.
        geometry: where crops are cut and resized, the `cpu` or the `device`; `auto`: on a GPU if the file is raw.
        output: `views`, or `crops`: uint8, before the photometric chain, whatever `dtype` is.

    Attributes:
        plan: which samples each batch holds.
        renderer: makes batches on the host.
        sender: copies them to the device.

    Raises:
        ValueError: the batches do not fit into memory.
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
        rows: NDArray[np.int64] | None = None,
        on_error: OnError = "raise",
        scaled_decode: bool = False,
        geometry: Geometry = "auto",
        output: Literal["views", "crops"] = "views",
    ) -> None:
        self.beton, self.recipe, self.seed = beton, recipe, seed
        self.device = device or torch.device("cpu")
        self.dtype = dtype
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
        self._batches_ahead, self._output = batches_ahead, output
        self.renderer = Renderer(
            beton,
            recipe,
            seed,
            target=_target(self.device, beton, geometry, output),
            num_threads=num_threads,
            scaled_decode=scaled_decode,
            pinned=self.device.type == "cuda",
            bad_samples=self._bad_samples,
        )
        self.sender = Sender(self.device)
        local_batch_size = -(-min(global_batch_size, self.plan.num_samples) // world_size)
        batch_bytes = buffer_bytes(self.renderer.batch_bytes(local_batch_size), pinned=self.device.type == "cuda")
        check_batches_fit(recipe, local_batch_size, batches_ahead + 2, bytes_per_number=4, batch_bytes=batch_bytes)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.plan)

    @property
    def num_skipped(self) -> int:
        """Samples that could not be decoded and were replaced."""
        return self._bad_samples.num_skipped

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on."""
        in_flight: deque[_InFlight] = deque()
        try:
            for batch in range(start_batch, len(self)):
                while len(in_flight) <= self._batches_ahead and batch + len(in_flight) < len(self):
                    samples = self.plan.samples(epoch, batch + len(in_flight))
                    in_flight.append(_InFlight(self.renderer.start(epoch, samples)))
                current = in_flight.popleft()
                sent = self._send(current)
                for later in in_flight:  # what is decoded already travels while the device works on this batch
                    if not later.rendering.is_made:
                        break
                    self._send(later)
                self.plan.record(epoch, batch)
                made = self._finish(current.rendering, sent)
                del current, sent  # their memory is free for the next batches while this one is in use
                yield made
        finally:
            for abandoned in in_flight:
                abandoned.rendering.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position; see `BatchPlan.load_state_dict`."""
        return self.plan.load_state_dict(state)

    def close(self) -> None:
        """Stop the threads and free their memory."""
        self.renderer.close()

    def _send(self, batch: _InFlight) -> Sent:
        """Wait until a batch is made, and send it to the device, unless it is on its way."""
        if batch.sent is None:
            batch.rendering = self.renderer.wait(batch.rendering)
            samples = batch.rendering.samples
            labels = np.full(len(samples), -1) if self.beton.labels is None else self.beton.labels[samples]
            batch.sent = self.sender.send(batch.rendering.out, self._pinned(labels))
        return batch.sent

    def _finish(self, made: Rendering, sent: Sent) -> Batch:
        """Hand a batch over, on the device."""
        out, labels = sent.receive()
        target = self.renderer.target
        views = self.crops(made, out) if target == "images" else self.renderer.views(made, out)
        if self._output == "views":
            if target != "views":
                views = [
                    photometric_chain(crops, made.params[:, v], self.recipe.views[v], self.recipe, self.dtype)
                    for v, crops in enumerate(views)
                ]
            views = [view.to(self.dtype) for view in views]
        return Batch(views=views, labels=labels, sample_indices=torch.from_numpy(made.samples), epoch=made.epoch)

    def crops(self, made: Rendering, pixels: Tensor) -> list[Tensor]:
        """Cut and resize whole images on the device, from `pixels`, the buffer of their batch or its copy."""
        images = PackedImages(
            pixels=pixels,
            offsets=to_device(made.starts, self.device),
            widths=to_device(self.beton.widths[made.samples], self.device),
            heights=to_device(self.beton.heights[made.samples], self.device),
        )
        return [crop_resize(images, made.params[:, v], view) for v, view in enumerate(self.recipe.views)]

    def _pinned(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _target(device: torch.device, beton: Beton, geometry: Geometry, output: Literal["views", "crops"]) -> Target:
    """What the threads make: as much as is not left to the device."""
    raw = bool((beton.modes == MODE_RAW).all())
    if geometry == "device" or (geometry == "auto" and device.type == "cuda" and raw):
        return "images"
    return "crops" if device.type == "cuda" or output == "crops" else "views"
