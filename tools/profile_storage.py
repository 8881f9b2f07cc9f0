"""How fast the stored bytes of images are read, in the order of a run and by as many threads.

Of a `.beton`: through the memory map, copied by a compiled loop that holds no lock, as the decoders take it. Of a
folder: file by file. Once with the page cache emptied of just these rows, which costs the user's cache no more than
they, and once out of it.

Pages leave the cache by MADV_PAGEOUT, which takes those that this process alone has mapped: so they are mapped first,
which reads nothing, since only those are touched that `mincore` finds in memory. Whether they are gone is looked up,
and told. It stays without effect in a tmpfs, and for files of another owner.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from native.compiled import source_hash
from pipelines.beton import Beton

GROUP_BYTES = 2**25  # that are timed at a time
GROUP_IMAGES = 4096  # likewise: enough for a group's start not to count
MADV_PAGEOUT = 21  # linux/mman.h, since 5.4; Python's `mmap` has no name for it
PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None)


class Stored(Protocol):
    """Images as they lie in storage."""

    def num_bytes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the rows [N], int64 [N]."""

    def read(self, rows: NDArray[np.int64]) -> None:
        """Bring their bytes into this process's memory; threads may call it side by side."""

    def drop(self, rows: NDArray[np.int64]) -> float:
        """Empty the page cache of them; the share of their pages that is in memory all the same."""


class StoredBeton:
    """The rows of a `.beton`."""

    def __init__(self, beton: Beton) -> None:
        self._beton, self._read = beton, read_kernel()
        self._data = np.asarray(beton.data)
        self._address = self._data.ctypes.data

    def num_bytes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Stored`."""
        return self._beton.sizes[rows]

    def read(self, rows: NDArray[np.int64]) -> None:
        """See `Stored`."""
        target = np.empty(int(self._beton.sizes[rows].max(initial=1)), np.uint8)
        self._read(self._data, self._beton.offsets, self._beton.sizes, rows, target)

    def drop(self, rows: NDArray[np.int64]) -> float:
        """See `Stored`."""
        left = pages = 0
        for row in rows.tolist():
            begin = self._address + int(self._beton.offsets[row])
            held, num = _drop(begin // PAGE * PAGE, begin + int(self._beton.sizes[row]))
            left, pages = left + held, pages + num
        return left / max(pages, 1)


class StoredFiles:
    """The files of a folder."""

    def __init__(self, files: list[str]) -> None:
        self._files = files

    def num_bytes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Stored`."""
        return np.array([Path(self._files[row]).stat().st_size for row in rows.tolist()], np.int64)

    def read(self, rows: NDArray[np.int64]) -> None:
        """See `Stored`."""
        for row in rows.tolist():
            with Path(self._files[row]).open("rb", buffering=0) as file:
                file.read()

    def drop(self, rows: NDArray[np.int64]) -> float:
        """See `Stored`."""
        left = pages = 0
        for row in rows.tolist():
            with Path(self._files[row]).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    continue
                with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
                    data = np.frombuffer(mapped, np.uint8)
                    held, num = _drop(data.ctypes.data, data.ctypes.data + size)
                    del data  # else the map could not be closed
            left, pages = left + held, pages + num
        return left / max(pages, 1)


class ColdReading(NamedTuple):
    """What reading rows took that were to be in no memory."""

    seconds_per_image: list[float]
    """Of each group, for all threads together."""
    rows: NDArray[np.int64]
    """int64; those."""
    left: float
    """Share of their pages that could not be dropped from the page cache."""


def read_cold(stored: Stored, batches: Iterator[NDArray[np.int64]], *, num_threads: int, seconds: float) -> ColdReading:
    """Read rows that the page cache was emptied of, group after group, for so many seconds; one group at least.

    Args:
        stored: the images.
        batches: rows, in the order of the run.
        num_threads: that read.
        seconds: until the last group begins.
    """
    found: list[float] = []
    read, lefts = [], []
    with ThreadPoolExecutor(num_threads) as pool:
        began = time.perf_counter()
        for rows in _groups(stored, batches):
            lefts.append(stored.drop(rows))
            found.append(_time(pool, stored.read, rows, num_threads))
            read.append(rows)
            if time.perf_counter() - began > seconds:
                break
    return ColdReading(found, np.concatenate(read), float(np.mean(lefts)))


def read_warm(stored: Stored, rows: NDArray[np.int64], *, num_threads: int, seconds: float) -> list[float]:
    """Read the same rows again and again, out of the page cache: seconds an image of each group, as `read_cold`."""
    found: list[float] = []
    groups = list(_groups(stored, iter([rows])))
    with ThreadPoolExecutor(num_threads) as pool:
        _time(pool, stored.read, groups[0], num_threads)  # the threads start, and map what they read
        began = time.perf_counter()
        while not found or time.perf_counter() - began < seconds:
            found += [_time(pool, stored.read, group, num_threads) for group in groups]
    return found


def _groups(stored: Stored, batches: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The same rows, in pieces that are timed."""
    waiting = np.zeros(0, np.int64)
    for rows in batches:
        waiting = np.concatenate((waiting, rows))
        mean = max(1.0, float(stored.num_bytes(rows).mean()))
        size = max(1, min(GROUP_IMAGES, int(GROUP_BYTES / mean)))
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def _time(
    pool: ThreadPoolExecutor, read: Callable[[NDArray[np.int64]], None], rows: NDArray[np.int64], num_threads: int
) -> float:
    """Seconds an image that all threads together take."""
    parts = [part for part in np.array_split(rows, num_threads) if len(part)]
    began = time.perf_counter()
    for _ in pool.map(read, parts):
        pass  # an exception comes out here
    return (time.perf_counter() - began) / len(rows)


def _drop(begin: int, end: int) -> tuple[int, int]:
    """Pages that are still in memory, and pages, of the addresses from `begin`, a page's, to `end`."""
    num = -(-(end - begin) // PAGE)
    held = _resident(begin, num)
    for page in np.flatnonzero(held).tolist():
        ctypes.string_at(begin + page * PAGE, 1)
    _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(num * PAGE), MADV_PAGEOUT)
    return int(_resident(begin, num).sum()), num


def _resident(begin: int, num_pages: int) -> NDArray[np.bool_]:
    """Which pages are in memory."""
    found = np.ones(num_pages, np.uint8)  # all of them, where the kernel does not tell
    _LIBC.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(num_pages * PAGE), ctypes.c_void_p(found.ctypes.data))
    return (found & 1).astype(np.bool_)


@cache
def read_kernel() -> Callable[..., None]:
    """The compiled loop that copies rows of a `.beton`."""
    version = source_hash("tools.profile_storage")

    @njit(nogil=True, cache=True)
    def read(data, offsets, sizes, rows, target):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Copy each of `rows` to the begin of `target`, uint8, large enough for any of them."""
        _ = version  # in the closure, and so in the key of Numba's cache
        for row in rows:
            target[: sizes[row]] = data[offsets[row] : offsets[row] + sizes[row]]

    return read  # type: ignore[no-any-return]
