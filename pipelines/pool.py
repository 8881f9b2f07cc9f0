"""Threads that decode: chunks of samples, taken as each thread becomes free, over the memory map.

There is no barrier between batches: a thread that finishes the last chunk of one takes the first of the next. An
exception in a chunk reaches whoever waits for it. Every thread owns a libjpeg-turbo handle and its working memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipelines.decode.kernel import Scratch
from pipelines.decode.resample import max_taps
from pipelines.decode.turbojpeg import NUM_CHANNELS, Decompressor


class Worker:
    """What one thread owns: a decompressor and scratch memory that grows to the largest image met.

    Args:
        view_sizes: sides of the views, pixels.
    """

    def __init__(self, view_sizes: Sequence[int]) -> None:
        self.decompressor = Decompressor()
        self._view_sizes = view_sizes
        self._scratch: Scratch | None = None

    def scratch(self, max_pixels: int, max_side: int) -> Scratch:
        """Working memory for images of up to `max_pixels` pixels and `max_side` pixels a side."""
        old = self._scratch
        if old and old.pixels.size >= max_pixels * NUM_CHANNELS and old.row.size >= max_side * NUM_CHANNELS:
            return old
        if old:
            max_pixels = max(max_pixels, old.pixels.size // NUM_CHANNELS)
            max_side = max(max_side, old.row.size // NUM_CHANNELS)
        size, smallest = max(self._view_sizes), min(self._view_sizes)
        self._scratch = Scratch(
            pixels=np.empty(max_pixels * NUM_CHANNELS, np.uint8),
            header=np.empty(4, np.int32),
            row=np.empty(max_side * NUM_CHANNELS, np.float32),
            firsts=np.empty((2, size), np.int32),
            counts=np.empty((2, size), np.int32),
            weights=np.empty((2, size, max_taps(max_side, smallest)), np.float32),
            crop=np.empty(size * size * 3, np.uint8),
            planes=np.empty(size * size * 4, np.float32),
        )
        return self._scratch


class DecodePool:
    """A fixed number of decoding threads.

    Args:
        num_threads: at least 1.
        view_sizes: sides of the views, pixels.
    """

    def __init__(self, num_threads: int, view_sizes: Sequence[int]) -> None:
        self._local = threading.local()
        self._view_sizes = view_sizes
        self._workers: list[Worker] = []
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode", initializer=self._start_thread)

    def submit(self, work: Callable[[Worker], None]) -> Future[None]:
        """Queue a chunk; `work` is called with the worker of whichever thread takes it."""
        return self._executor.submit(lambda: work(self._local.worker))

    def close(self) -> None:
        """Drop the chunks that have not begun, wait for those that have, and free the threads' memory."""
        self._executor.shutdown(cancel_futures=True)
        while self._workers:
            self._workers.pop().decompressor.close()

    def _start_thread(self) -> None:
        self._local.worker = Worker(self._view_sizes)
        self._workers.append(self._local.worker)
