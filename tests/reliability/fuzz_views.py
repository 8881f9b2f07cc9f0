"""What fuzzing does with a `.beton`: everything that reads one, as a run would, in memory that ends where it should.

The bytes of the file, the threads' scratch and the batches lie at the ends of pages, before a page that nobody may
touch: what reads or writes beyond is a crash. What lies before them is looked at afterwards.
"""

import ctypes
import mmap
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import pipelines.pool
import pipelines.rendering
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import BetonError, open_beton
from pipelines.buffers import HostBuffers
from pipelines.dali_check import JpegCheck
from pipelines.ffcv_loader import FFCVLoader
from pipelines.manifest import ManifestError, load_manifest
from pipelines.pool import Worker
from pipelines.resident_loader import ResidentLoader
from tools.verify import verify

SIZE = 16
RECIPE = build_recipe(AugmentConfig(size=SIZE))
SPARE_MEMORY = 3 * 2**30  # that a case may ask for: what the file says is not believed beyond that
LARGEST_FENCED = 2**22
FENCE = 64  # bytes before each array, whose value is known
MARK = 0xA5

REFUSED_AT_OPENING, ALL_VIEWS, SOME_REFUSED, NO_VIEWS = (
    "refused at opening",
    "all views",
    "a sample refused",
    "no views",
)

_arenas: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
_fences: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def fenced(name, num_bytes, alignment=64):
    """Memory of uint8 that ends at a page which cannot be touched, or less than `alignment` before it."""
    check_fence(name)
    if name not in _arenas or _arenas[name][1].size < num_bytes + FENCE + alignment:
        pages = max(-(-(num_bytes + FENCE + alignment) // mmap.PAGESIZE) * 2, 16)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        array = np.frombuffer(memory, np.uint8)
        fence = ctypes.c_void_p(array.ctypes.data + pages * mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        _arenas[name] = memory, array[: pages * mmap.PAGESIZE]
    arena = _arenas[name][1]
    begin = (arena.size - num_bytes) // alignment * alignment
    _fences[name] = arena[begin - FENCE : begin], arena[begin + num_bytes :]
    for fence in _fences[name]:
        fence[:] = MARK
    return arena[begin : begin + num_bytes]


def check_fence(name):
    """That nothing beside an array was written."""
    for fence in _fences.pop(name, ()):
        assert (fence == MARK).all(), f"memory beside `{name}` was written"


class FencedWorker(Worker):
    """A decoding thread's memory with fences around it."""

    def _allocate(self, max_pixels, max_side):
        scratch = super()._allocate(max_pixels, max_side)
        arrays = {}
        for name, array in scratch._asdict().items():
            if array.nbytes <= LARGEST_FENCED:
                memory = fenced(name, array.nbytes, alignment=1 if name in ("pixels", "jpeg") else 64)
                arrays[name] = memory.view(array.dtype).reshape(array.shape)
        return scratch._replace(**arrays)


class FencedBuffers(HostBuffers):
    """Batches with fences around them; what nobody writes is NaN."""

    def take(self, size):
        memory = fenced("out", size * self._dtype.itemsize).view(self._dtype)
        memory.fill(np.nan if self._dtype == np.float32 else 77)
        return torch.from_numpy(memory)


def prepare():
    """Fences in this process, and a limit to the memory that it may ask for."""
    pipelines.pool.Worker, pipelines.rendering.HostBuffers = FencedWorker, FencedBuffers
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + SPARE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def exercise(path, rng):
    """Read a file in every way; returns what became of it.

    Any exception that comes out, and AssertionError among them, is a bug.
    """
    _fences.clear()
    try:
        beton = open_beton(path)
    except BetonError as error:
        _check_message(error, path)
        return REFUSED_AT_OPENING
    _check_tables(beton)
    beton = _at_the_fence(beton)
    modes = [
        _load(partial(FFCVLoader, scaled_decode=scaled), beton, on_error, rng) for scaled, on_error in _policies(rng)
    ]
    if rng.random() < 0.1:
        modes.append(_load(partial(FFCVLoader, geometry="device"), beton, "skip", rng))
    if rng.random() < 0.1:
        modes.append(_load(ResidentLoader, beton, rng.choice(("raise", "skip")), rng))
    if rng.random() < 0.1:
        _check_by_dali(beton)
    if rng.random() < 0.1:
        _verify(path)
    for name in list(_fences):
        check_fence(name)
    if all(mode == ALL_VIEWS for mode in modes):
        return ALL_VIEWS
    return SOME_REFUSED if ALL_VIEWS in modes or SOME_REFUSED in modes else NO_VIEWS


def _policies(rng):
    return zip(rng.sample((False, True), 2), rng.sample(("raise", "skip"), 2), strict=True)


def _check_message(error, path):
    message = str(error)
    assert str(path) in message, message
    assert message.isprintable(), message


def _check_tables(beton):
    """What `open_beton` promises."""
    assert (beton.offsets >= 0).all()
    assert (beton.sizes > 0).all()
    assert (beton.offsets + beton.sizes <= beton.data.size).all()
    assert (beton.widths > 0).all()
    assert (beton.heights > 0).all()
    raw = beton.modes == 1
    assert (beton.sizes[raw] == 3 * beton.widths[raw].astype(np.int64) * beton.heights[raw]).all()


def _at_the_fence(beton):
    """The same, with nothing behind the last sample's bytes."""
    first, end = int(beton.offsets.min()), int((beton.offsets + beton.sizes).max())
    memory = fenced("data", end - first, alignment=1)
    memory[:] = beton.data[first:end]
    return replace(beton, data=memory, offsets=beton.offsets - first)


def _load(make, beton, on_error, rng):
    """All samples of a file, in one batch."""
    loader = None
    try:
        options = {"seed": rng.randrange(2**63), "global_batch_size": beton.num_samples, "on_error": on_error}
        loader = make(beton, RECIPE, **options)
        batch = next(loader.epoch(0))
        skipped = loader.num_skipped
    except ValueError as error:
        _check_message(error, beton.path)
        return NO_VIEWS
    finally:
        if loader:
            loader.close()
    assert len(batch.views) == len(RECIPE.views)
    for view in batch.views:
        assert view.shape == (beton.num_samples, 3, SIZE, SIZE)
        assert torch.isfinite(view).all()
        assert (view >= 0).all()
        assert (view <= 1).all()
    assert batch.labels.shape == batch.sample_indices.shape == (beton.num_samples,)
    return SOME_REFUSED if skipped else ALL_VIEWS


def _check_by_dali(beton):
    check = JpegCheck(beton, 1)
    samples = np.arange(beton.num_samples)
    try:
        for future in check.start(samples):
            future.result()
        for bad in check.bad(samples).tolist():
            assert check.reason(bad)
    finally:
        check.close()


def _verify(path):
    try:
        load_manifest(path)
    except ManifestError as error:
        _check_message(error, path)
    for problem in verify(path, workers=1):
        assert problem.isprintable()
