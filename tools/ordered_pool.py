"""A thread pool that hands results back in order and holds only a few of them.

Decoding and encoding images release the interpreter's lock, so threads are enough, and nothing is pickled.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class OrderedMap(Protocol):
    """`map`, computed ahead by several threads."""

    def __call__(self, work: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[tuple[ItemT, ResultT]]:
        """Yields (item, work(item)) in the items' order; what `work` raises is raised here."""


@contextmanager
def ordered_pool(num_threads: int) -> Iterator[OrderedMap]:
    """Threads for the block; at its end, however it comes, work that has not begun is dropped."""
    window = 4 * num_threads  # deep enough to bridge one slow image, small enough for 16 huge ones
    pool = ThreadPoolExecutor(num_threads)

    def ordered_map(work: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[tuple[ItemT, ResultT]]:
        pending: deque[tuple[ItemT, Future[ResultT]]] = deque()
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) >= window:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    try:
        yield ordered_map
    finally:
        pool.shutdown(cancel_futures=True)


def num_available_cores() -> int:
    """Cores that this process may use, which a container or a scheduler may have limited."""
    return len(os.sched_getaffinity(0))
