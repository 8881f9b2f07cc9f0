"""The stages of a loader, each by itself, through the run's own loader on the run's own threads.

What a stage takes is counted where it happens: the decoding threads read a clock between the parts of their kernel
while they make the run's batches, in the run's order, all of them busy; work on a GPU lies between two events. So the
stages of one set of threads add up to what the whole takes there, and a stage's rate is what those threads could do
without the others. The loader alone is then measured without any clock.

Legend: N images of a rank's batch.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, Loader
from pipelines.dali_loader import DALILoader
from pipelines.decode.clock import CROP, DECODE, PHOTOMETRIC, WALL
from pipelines.draw import draw_views
from pipelines.ffcv_loader import FFCVLoader
from pipelines.folder_loader import FolderLoader
from pipelines.params import ViewParams
from pipelines.plan import BatchPlan
from pipelines.rendering import Rendering
from pipelines.resident_loader import ResidentLoader
from tools.profile_batch_work import Times, after_host, colour_times, resident_times
from tools.profile_folder import folder_times
from tools.profile_storage import Stored, StoredBeton, StoredFiles, read_cold, read_warm

MIN_BATCHES = 3
TOGETHER = 4  # batches that are timed together: a GPU is waited for after them alone
CANNOT_DROP = 0.5  # share of the pages that stay in memory
KERNEL = "inside the loader's kernel"


@dataclass(frozen=True, kw_only=True)
class LoaderBench:
    """A loader to be measured.

    Attributes:
        loader: of this rank.
        device: where views go.
        num_threads: decoding threads, or processes.
        batches_ahead: as the run has them.
        seconds: that each measurement may take.
        local_rank: of this process, among those of its machine.
        local_world_size: those.
        meet: waits for the other ranks.
    """

    loader: Loader
    device: torch.device
    num_threads: int
    batches_ahead: int
    seconds: float
    local_rank: int = 0
    local_world_size: int = 1
    meet: Callable[[], None] = lambda: None

    @property
    def plan(self) -> BatchPlan:
        """Which images each batch holds."""
        plan: BatchPlan = self.loader.plan  # type: ignore[attr-defined]
        return plan

    @property
    def local_batch_size(self) -> int:
        """N."""
        return self.plan.global_batch_size // self.plan.world_size

    def batches(self) -> Iterator[tuple[int, int]]:
        """Epoch and number of the batches of a run, without end."""
        epoch = 0
        while True:
            yield from ((epoch, batch) for batch in range(len(self.loader)))
            epoch += 1

    def samples(self) -> Iterator[NDArray[np.int64]]:
        """Rows of the batches of an epoch."""
        return (self.plan.samples(0, batch) for batch in range(len(self.loader)))


def loader_times(bench: LoaderBench) -> tuple[dict[str, Times], float]:
    """What each stage takes, by name, and the bytes of a stored image, on average."""
    loader = bench.loader
    stored, stored_bytes = _stored(bench)
    times: dict[str, Times] = {}
    if stored is not None:
        times |= _storage_times(bench, stored)
    if isinstance(loader, FFCVLoader):
        return times | _ffcv_times(bench, loader), stored_bytes
    if isinstance(loader, DALILoader):
        return times | _dali_times(bench, loader), stored_bytes
    if isinstance(loader, FolderLoader):
        found = folder_times(loader, bench.num_threads, bench.seconds)
        times |= {name: Times(seconds=values, how=how) for name, (values, how) in found.items()}
        return times | colour_times(*_folder_crops(loader), loader.recipe, loader.dtype, bench.seconds), stored_bytes
    assert isinstance(loader, ResidentLoader)
    return times | resident_times(loader, bench.seconds), stored_bytes


def seconds_alone(bench: LoaderBench) -> list[float]:
    """Seconds for a batch of the loader, nobody doing anything with them, several times."""
    done: list[float] = []
    with closing(run_batches(bench.loader)) as batches:
        for _ in range(1 + bench.batches_ahead):  # what is made while nobody asks is no measure
            next(batches)
        _finish(bench.device)
        began = last = time.perf_counter()
        while len(done) < MIN_BATCHES or last - began < bench.seconds:
            for _ in range(TOGETHER):
                next(batches)
            _finish(bench.device)
            now = time.perf_counter()
            done.append((now - last) / TOGETHER)
            last = now
    return done


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_batches(loader: Loader) -> Generator[Batch, None, None]:
    """The batches of a run, epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _stored(bench: LoaderBench) -> tuple[Stored | None, float]:
    """The images in storage, and the bytes of one; no storage where nothing is read in a step."""
    loader = bench.loader
    if isinstance(loader, FolderLoader):
        files = StoredFiles(loader.dataset.files)
        return files, float(files.num_bytes(bench.plan.samples(0, 0)).mean())
    beton = loader.beton  # type: ignore[attr-defined]
    rows = bench.plan.rows
    mean = float((beton.sizes if rows is None else beton.sizes[rows]).mean())
    return (StoredBeton(beton) if isinstance(loader, (FFCVLoader, DALILoader)) else None), mean


def _storage_times(bench: LoaderBench, stored: Stored) -> dict[str, Times]:
    """Reading what the page cache does not hold, by one rank of a machine for all of them, and what it does.

    Ranks keep each other's pages in memory, and share what storage can do: one reads, on the threads of all.
    """
    what = "files" if isinstance(stored, StoredFiles) else "rows through the memory map"
    ranks, rows = bench.local_world_size, next(bench.samples())
    threads, local = ranks * bench.num_threads, bench.local_batch_size
    cold = Times(seconds=[0.0], how="measured by the first rank of the machine")
    if bench.local_rank == 0:
        found = read_cold(stored, bench.samples(), num_threads=threads, seconds=bench.seconds)
        rows = found.rows
        how = f"{len(rows)} {what}, in the run's order on {threads} threads"
        if found.left > CANNOT_DROP:
            how += f"; the page cache could not be emptied of them ({found.left:.0%} stayed)"
        else:
            how += f", dropped from the page cache before ({found.left:.0%} stayed)"
        # Of a rank's batch; `ranks` again, since the mean over the ranks has the zeros of the others in it.
        cold = Times(seconds=[value * local * ranks * ranks for value in found.seconds_per_image], how=how)
    bench.meet()
    warm = read_warm(stored, rows, num_threads=bench.num_threads, seconds=bench.seconds / 3)
    how = f"{len(rows)} {what}, on {bench.num_threads} threads, out of the page cache; decoding reads them as well"
    return {"storage_cold": cold, "storage_warm": Times(seconds=[value * local for value in warm], how=how)}


def _ffcv_times(bench: LoaderBench, loader: FFCVLoader) -> dict[str, Times]:
    """Of the kernel's parts on the threads, of copies, and of what is left to the device."""
    renderer, kept = loader.renderer, None
    parts = defaultdict(list)
    renderer.clock = WALL
    try:
        for made in _rendered(bench, loader):
            spent = sum(made.spent, np.zeros(4)) / 1e9 / bench.num_threads
            for name, part in (("decode", DECODE), ("crop", CROP), ("photometric", PHOTOMETRIC)):
                parts[name].append(float(spent[part]))
            kept = made
    finally:
        renderer.clock = None
    assert kept is not None
    threads = f"on {bench.num_threads} threads, {KERNEL}"
    whole = "drawing what happens to it, and reading"
    how = {
        "decode": f"{'the whole image' if renderer.target == 'images' else 'the rows that are needed'}, {whole}; "
        f"{threads}",
        "crop": f"every view, cut and resized; {threads}",
        "photometric": f"every view, coloured and normalised; {threads}",
    }
    on_host = {"views": ["decode", "crop", "photometric"], "crops": ["decode", "crop"], "images": ["decode"]}
    times = {name: Times(seconds=parts[name], how=how[name]) for name in on_host[renderer.target]}
    return times | after_host(loader, kept, bench.seconds)


def _rendered(bench: LoaderBench, loader: FFCVLoader) -> Iterator[Rendering]:
    """Batches of the run as the threads make them, always some ahead; the first ones are left out."""
    in_flight: deque[Rendering] = deque()
    batches, began, count = bench.batches(), 0.0, -bench.batches_ahead - 1
    try:
        while count < MIN_BATCHES or time.perf_counter() - began < bench.seconds:
            while len(in_flight) <= bench.batches_ahead:
                epoch, batch = next(batches)
                in_flight.append(loader.renderer.start(epoch, bench.plan.samples(epoch, batch)))
            made = loader.renderer.wait(in_flight.popleft())
            count += 1
            if count > 0:
                yield made
            else:  # until all is compiled, and threads and pages are in their places
                began = time.perf_counter()
    finally:
        for abandoned in in_flight:
            abandoned.cancel()


def _dali_times(bench: LoaderBench, loader: DALILoader) -> dict[str, Times]:
    """DALI decodes and cuts in one graph: what it yields without colours, and those."""
    where = f"DALI, {'nvJPEG on the GPU' if bench.device.type == 'cuda' else f'on {bench.num_threads} threads'}"
    ours = loader.photometric == "ours"
    if ours:
        loader.output = "crops"
    try:
        seconds = seconds_alone(bench)
        crops = next(loader.epoch(0))
    finally:
        loader.output = "views"
    what = "decoding and cropping" if ours else "decoding, cropping and colours"
    times = {"decode": Times(seconds=seconds, how=f"{what}, one graph of {where}")}  # beside the step, also on a GPU
    if not ours:
        return times
    rows = crops.sample_indices.numpy()
    params = draw_views(loader.recipe, loader.seed, 0, rows, loader.beton.widths[rows], loader.beton.heights[rows])
    return times | colour_times(crops.views, params, loader.recipe, loader.dtype, bench.seconds)


def _folder_crops(loader: FolderLoader) -> tuple[list[Tensor], ViewParams]:
    made = loader.dataset.collate([loader.dataset[0, row] for row in loader.plan.samples(0, 0).tolist()])
    views = [view.to(loader.device).contiguous(memory_format=torch.channels_last) for view in made.views]
    return views, made.params


def touch(bench: LoaderBench, num_batches: int) -> None:
    """Bring the rows of the first batches into the page cache, so that what follows finds them there."""
    stored, _ = _stored(bench)
    if stored is None:
        return
    with ThreadPoolExecutor(bench.num_threads) as pool:
        rows = [bench.plan.samples(0, batch) for batch in range(min(num_batches, len(bench.loader)))]
        for _ in pool.map(stored.read, rows):
            pass  # an exception comes out here
