"""Named stretches of a training step, for whoever measures or traces it; next to free while nobody listens.

The engine names `forward`, `loss`, `backward` and `optimizer`. `torch.profiler` and, by way of `emit_nvtx`, NVIDIA's
tools see them under these names whenever they record; other listeners are told of every begin and end. Stretches may
lie within one another. On a GPU the backward pass of an operation runs in a thread of its own, while the thread that
began the stretch waits: at no time do two of them begin or end one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch


class Listener(Protocol):
    """Is told what a training step is at."""

    def begin(self, name: str) -> None:
        """A stretch begins, within those that have not ended."""

    def end(self, name: str) -> None:
        """The stretch that began last has ended, also where an error ended it."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of all stretches meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class stage:  # noqa: N801 — used as a statement: `with stage("forward"):`
    """A stretch of the step, as a context manager.

    Args:
        name: of the stretch.
    """

    __slots__ = ("_name", "_record")

    def __init__(self, name: str) -> None:
        self._name = name
        self._record: torch.profiler.record_function | None = None

    def __enter__(self) -> None:
        if torch.autograd.profiler._is_profiler_enabled:
            self._record = torch.profiler.record_function(self._name)
            self._record.__enter__()  # type: ignore[no-untyped-call]
        for listener in _listeners:
            listener.begin(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in reversed(_listeners):
            listener.end(self._name)
        if self._record is not None:
            self._record.__exit__(kind, error, trace)


class NvtxRanges:
    """Shows the stretches to NVIDIA's tools, without torch's profiler."""

    def begin(self, name: str) -> None:
        """Open a range of this name."""
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def end(self, name: str) -> None:
        """Close the range that was opened last."""
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
