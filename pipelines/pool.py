"""Threads that decode: chunks of samples, taken as each thread becomes free, over the memory map.

There is no barrier between batches: a thread that finishes the last chunk of one takes the first of the next. An
exception in a chunk reaches whoever waits for it. Every thread owns a libjpeg-turbo handle and its working memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.kernel import Scratch
from pipelines.decode.resample import OVERREAD, TRIANGLE, columns_size, max_taps, packed_size
from pipelines.decode.rows import MAX_BYTES
from pipelines.decode.turbojpeg import NUM_CHANNELS, Decompressor

CACHE_LINE = 64  # bytes
KEPT_PIXELS = 2**22  # of scratch for a decoded image: 16 MiB; what a larger one takes is given back after it


class Worker:
    """What one thread owns: a decompressor and scratch memory that grows to the largest usual image met.

    Args:
        view_sizes: sides of the views, pixels.
        filter_radius: of the widest filter that resizes crops.
    """

    def __init__(self, view_sizes: Sequence[int], filter_radius: int = TRIANGLE) -> None:
        self.decompressor = Decompressor()
        self._view_sizes, self._filter_radius = view_sizes, filter_radius
        self._jpeg = np.empty(MAX_BYTES, np.uint8)
        self._scratch: Scratch | None = None
        self._max_pixels = self._max_side = 0

    def scratch(self, max_pixels: int, max_side: int) -> Scratch:
        """Working memory for images of up to `max_pixels` pixels and `max_side` pixels a side."""
        if self._scratch and max_pixels <= self._max_pixels and max_side <= self._max_side:
            return self._scratch
        if max_pixels > KEPT_PIXELS:
            return self._allocate(max_pixels, max_side)
        self._max_pixels = max(max_pixels, self._max_pixels)
        self._max_side = max(max_side, self._max_side)
        self._scratch = self._allocate(self._max_pixels, self._max_side)
        return self._scratch

    def _allocate(self, max_pixels: int, max_side: int) -> Scratch:
        size, taps = max(self._view_sizes), max_taps(max_side, min(self._view_sizes), self._filter_radius)
        return Scratch(
            pixels=np.empty(max_pixels * NUM_CHANNELS + OVERREAD, np.uint8),
            header=np.empty(4, np.int32),
            jpeg=self._jpeg,
            columns=_aligned(columns_size(max_side)),
            packed=np.empty(packed_size(size), np.uint32),
            firsts=np.empty((2, size), np.int32),
            counts=np.empty((2, size), np.int32),
            weights=np.empty((2, size, taps), np.float32),
            planes=_aligned(size * size * 4),
        )


def _aligned(size: int) -> NDArray[np.float32]:
    """Memory for float32 vectors that do not straddle two cache lines."""
    memory = np.empty(size + CACHE_LINE // 4, np.float32)
    skipped = -memory.ctypes.data % CACHE_LINE // 4
    return memory[skipped : skipped + size]


class DecodePool:
    """A fixed number of decoding threads.

    Args:
        num_threads: at least 1.
        view_sizes: sides of the views, pixels.
        filter_radius: of the widest filter that resizes crops.
    """

    def __init__(self, num_threads: int, view_sizes: Sequence[int], filter_radius: int = TRIANGLE) -> None:
        self._workers: list[Worker] = []
        self._local = threading.local()
        start = partial(_start_thread, self._local, self._workers, view_sizes, filter_radius)
        # The threads know nothing of the pool, so that they end with a pool that is dropped without `close`.
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode", initializer=start)

    def submit(self, work: Callable[[Worker], None]) -> Future[None]:
        """Queue a chunk; `work` is called with the worker of whichever thread takes it."""
        local = self._local
        return self._executor.submit(lambda: work(local.worker))

    def close(self) -> None:
        """Drop the chunks that have not begun, wait for those that have, and free the threads' memory."""
        self._executor.shutdown(cancel_futures=True)
        while self._workers:
            self._workers.pop().decompressor.close()


def _start_thread(local: threading.local, workers: list[Worker], view_sizes: Sequence[int], filter_radius: int) -> None:
    local.worker = Worker(view_sizes, filter_radius)
    workers.append(local.worker)
