"""The loader for `.beton` files through NVIDIA DALI: decoding by nvJPEG on a GPU, or by DALI's threads on the CPU.

The same file, order, parameters and `Batch` as `pipelines.ffcv_loader`, with DALI's decoder and resampler in the place
of ours. JPEG bytes go to DALI from the memory map, without a copy. DALI works `batches_ahead` batches ahead on threads
of its own, while the thread that takes batches applies the photometric chain, on the device.

`photometric="dali"` takes DALI's own operators, with the factors that were drawn for ours; they do the same kinds of
change with other arithmetic (`pipelines.dali_pipeline` says which). `docs/guides/loaders.md` says what was measured
of decoders and colours, and which loader to choose.

Legend: N local images, V views, S side of a view.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bad_samples import OnError, bad_samples_of
from pipelines.batch import Batch
from pipelines.beton import Beton
from pipelines.buffers import check_batches_fit
from pipelines.dali_batches import BatchMaker, Drawn, Planned
from pipelines.dali_check import JpegCheck
from pipelines.dali_pipeline import Inputs, Photometric, ViewPipeline, check_recipe, import_dali
from pipelines.params import ViewParams
from pipelines.photometric.chain import photometric_chain
from pipelines.photometric.reference import to_device
from pipelines.plan import plan_of
from pipelines.recipe import Recipe, ViewRecipe

OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|MemoryAllocation", re.IGNORECASE)


class DALILoader:
    """Yields batches of views from a `.beton`; implements `pipelines.batch.Loader`.

    Args:
        beton: the open file; its samples are all JPEGs or all raw.
        recipe: of the views.
        seed: of the order and of every view.
        global_batch_size: images over all ranks; divisible by `world_size` when training.
        rank: of this process.
        world_size: number of ranks.
        device: where views are made and go; on a CUDA device JPEGs are decoded there.
        dtype: of the views.
        num_threads: DALI's; and as many that check each JPEG before it is decoded for the first time.
        batches_ahead: batches in flight beside the one in use, at least 1.
        training: shuffle and drop the last partial global batch; else keep the file's order and every image.
        rows: int64, rising: those of the file's rows that are used; None: all.
        on_error: `raise` stops at a sample that cannot be decoded; `skip` names it, counts it, and uses its neighbour.
        photometric: `ours`: the chain of `pipelines.photometric`; `dali`: DALI's operators, with our factors.
        output: `views`, or under photometric `ours` also `crops`: uint8, before the chain, whatever `dtype` is.

    Raises:
        RuntimeError: DALI is not installed.
        ValueError: the file mixes raw and JPEG samples, or `photometric="dali"` cannot do what the recipe asks for.
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
        photometric: Photometric = "ours",
        output: Literal["views", "crops"] = "views",
    ) -> None:
        import_dali()
        if photometric == "dali":
            check_recipe(recipe)
        self.beton, self.recipe, self.seed = beton, recipe, seed
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.photometric, self.output = photometric, output
        self._batch_size = -(-global_batch_size // world_size)
        self._num_threads, self._batches_ahead = num_threads, batches_ahead
        self.plan = plan_of(
            beton,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            training=training,
            rows=rows,
        )
        # Crops of 8 bits in DALI's hands, and finished views of one batch; on a GPU, memory that torch knows better.
        if self.device.type == "cpu":
            local_batch_size = min(self._batch_size, self.plan.num_samples)
            check_batches_fit(recipe, local_batch_size, batches_ahead + 5, bytes_per_number=1)
        self._bad_samples = bad_samples_of(beton, on_error, training=training, rows=rows)
        self._check = JpegCheck(beton, num_threads)
        self._maker = BatchMaker(beton, recipe, self.plan, self._bad_samples, self._check, photometric)
        self._idle: ViewPipeline | None = None  # left by a whole epoch
        self._runs: list[_EpochRun] = []
        self._lent: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.plan)

    @property
    def num_skipped(self) -> int:
        """Samples that could not be decoded and were replaced."""
        return self._bad_samples.num_skipped

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on."""
        run = _EpochRun(self, epoch, start_batch)
        self._runs.append(run)
        try:
            for batch in range(start_batch, len(self)):
                drawn, images = run.next_batch()
                self.plan.record(epoch, batch)
                made = self._finish(drawn, images, epoch)
                del images  # held only as long as they are read
                if batch + 1 == len(self):  # who takes the last batch need not ask for one more
                    self._idle = run.release_pipeline()
                yield made
        finally:
            run.close()
            self._runs.remove(run)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position; see `BatchPlan.load_state_dict`."""
        return self.plan.load_state_dict(state)

    def close(self) -> None:
        """Stop the threads, DALI's too, and free their memory."""
        for run in self._runs:
            run.close()
        while self._lent:
            self._lent.popleft()[0].synchronize()
        self._idle = None
        self._check.close()

    def _take_pipeline(self) -> ViewPipeline:
        """The one that a whole epoch left, or a new one."""
        pipeline, self._idle = self._idle, None
        return pipeline or self._make_pipeline(self._batch_size)

    def _make_pipeline(self, batch_size: int) -> ViewPipeline:
        return ViewPipeline(
            self.recipe,
            raw=self._maker.raw,
            batch_size=batch_size,
            num_threads=self._num_threads,
            device=self.device,
            queue_depth=self._batches_ahead + 1,
            photometric=self.photometric,
        )

    def _find_bad_samples(self, drawn: Drawn, failure: RuntimeError) -> None:
        """Condemn the samples for which DALI failed a batch, by giving it one sample at a time.

        Raises:
            RuntimeError: it takes each of them, or there is no memory.
        """
        if OUT_OF_MEMORY.search(_in_one_line(failure)):
            raise RuntimeError(_out_of_memory(failure))
        found = False
        probe = self._make_pipeline(batch_size=1)
        probe.begin(self._maker.one_by_one(drawn))
        for sample in drawn.samples.tolist():
            try:
                probe.run()
            except RuntimeError as error:
                if OUT_OF_MEMORY.search(_in_one_line(error)):
                    raise RuntimeError(_out_of_memory(error)) from error
                self._check.condemn(sample, self._check.again(sample) or _in_one_line(error))
                found = True
        probe.close()
        if not found:
            raise RuntimeError(f"DALI failed, though it takes each sample by itself: {_in_one_line(failure)}")

    def _finish(self, drawn: Drawn, images: list[Tensor], epoch: int) -> Batch:
        """Hand a batch over, in its colours."""
        labels, num = self.beton.labels, len(drawn.samples)
        views = [
            self._color(image, drawn.params[:, v], view)
            for v, (image, view) in enumerate(zip(images, self.recipe.views, strict=True))
        ]
        if self.device.type == "cuda":
            self._keep_until_read(images)
        return Batch(
            views=views,
            labels=to_device(np.full(num, -1) if labels is None else labels[drawn.samples], self.device),
            sample_indices=torch.from_numpy(drawn.samples),
            epoch=epoch,
        )

    def _color(self, images: Tensor, params: ViewParams, view: ViewRecipe) -> Tensor:
        if self.output == "crops":
            return images.clone()  # DALI writes its memory again
        if self.photometric == "ours" and len(images):
            return photometric_chain(images, params, view, self.recipe, self.dtype)
        return images.to(self.dtype, copy=self.device.type == "cuda")

    def _keep_until_read(self, images: list[Tensor]) -> None:
        """Hold DALI's memory until the current stream, which has just been told to read it, has done so."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._lent.append((event, images))
        while self._lent and self._lent[0][0].query():  # type: ignore[no-untyped-call]
            self._lent.popleft()


class _EpochRun:
    """One epoch on its way through a pipeline: DALI takes batches out of it, by `next`, before they are asked for.

    A bad sample that stops the run does so when its batch is asked for, however far ahead it was found.
    """

    def __init__(self, loader: DALILoader, epoch: int, start_batch: int) -> None:
        self._loader, self._maker, self._epoch = loader, loader._maker, epoch
        self._unplanned = deque(range(start_batch, len(loader)))
        self._planned: deque[Planned] = deque()  # their samples are being checked
        self._given: deque[Drawn] = deque()  # in DALI's hands
        self._error: ValueError | None = None
        self._released = False
        self._pipeline = loader._take_pipeline()
        self._pipeline.begin(self)

    def __iter__(self) -> _EpochRun:
        return self

    def __next__(self) -> Inputs:
        """The next batch, for DALI."""
        while len(self._planned) < 2 and self._unplanned:  # the second is checked while DALI decodes the first
            self._planned.append(self._maker.plan_batch(self._epoch, self._unplanned.popleft()))
        if self._error or not self._planned or not len(self._planned[0].samples):
            raise StopIteration
        try:
            drawn = self._maker.draw_batch(self._planned[0], self._epoch)
        except ValueError as error:
            self._error = error
            raise StopIteration from None
        self._planned.popleft()
        self._given.append(drawn)
        return drawn.inputs

    def next_batch(self) -> tuple[Drawn, list[Tensor]]:
        """A batch and its views out of DALI.

        Raises:
            ValueError: a sample cannot be decoded, and that stops the run.
            RuntimeError: DALI failed for another reason.
        """
        while True:
            try:
                images = self._pipeline.run()
            except StopIteration:
                if self._error:
                    raise self._error from None
                return self._no_images()
            except RuntimeError as error:
                self._start_anew(error)
            else:
                return self._given.popleft(), images

    def _no_images(self) -> tuple[Drawn, list[Tensor]]:
        """This rank's share of a last batch that is smaller than the number of ranks; DALI knows no empty batch."""
        drawn = self._maker.draw_batch(self._planned.popleft(), self._epoch)
        loader = self._loader
        return drawn, [torch.empty((0, 3, v.size, v.size), device=loader.device) for v in loader.recipe.views]

    def release_pipeline(self) -> ViewPipeline:
        """Hand on the pipeline of an epoch that has come to its end, for another one."""
        self._released = True
        self._pipeline.begin(iter(()))
        return self._pipeline

    def close(self) -> None:
        """Stop DALI's threads, unless the pipeline was handed on."""
        if not self._released:
            self._pipeline.close()

    def _start_anew(self, failure: RuntimeError) -> None:
        """Go on with the batch that DALI could not make, without the samples that were at fault."""
        self._pipeline.close()
        self._loader._find_bad_samples(self._given[0], failure)
        self._planned.extendleft(Planned(drawn.samples, []) for drawn in reversed(self._given))
        self._given.clear()
        self._error = None  # of a later batch, which comes again
        self._pipeline = self._loader._take_pipeline()
        self._pipeline.begin(self)


def _out_of_memory(error: RuntimeError) -> str:
    return (
        "DALI ran out of memory; use a smaller `data.global_batch_size`, fewer or smaller views, or a lower "
        f"`data.batches_ahead` ({_in_one_line(error)})"
    )


def _in_one_line(failure: RuntimeError) -> str:
    """What DALI says after the traceback of the pipeline's definition."""
    text = str(failure).partition("encountered:")[2].partition("Current pipeline object")[0] or str(failure)
    return " ".join(text.split())
