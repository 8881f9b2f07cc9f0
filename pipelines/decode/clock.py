"""How long the parts of a kernel take: a clock that the kernel itself reads, for whoever measures it.

A kernel that is given no clock is compiled without any of this.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

ELSEWHERE, DECODE, CROP, PHOTOMETRIC = range(4)
"""The parts of `pipelines.decode.kernel.render`, and what lies between its calls."""
NUM_PARTS = 4
WALL, THREAD = time.CLOCK_MONOTONIC, time.CLOCK_THREAD_CPUTIME_ID
"""What may be counted: time that passes, or time in which a core works for the thread."""
SECOND = 10**9  # nanoseconds

_clock_gettime = types.ExternalFunction("clock_gettime", types.intc(types.intc, types.uintp))


class Clock(NamedTuple):
    """One call's."""

    kind: int
    """WALL or THREAD."""
    reading: NDArray[np.int64]
    """[2]; C's `struct timespec`."""
    last: NDArray[np.int64]
    """[1]; when it was read before, nanoseconds."""
    spent: NDArray[np.int64]
    """[NUM_PARTS]; nanoseconds in each part."""


def new_clock(kind: int) -> Clock:
    """That has not been read."""
    return Clock(kind, np.zeros(2, np.int64), np.zeros(1, np.int64), np.zeros(NUM_PARTS, np.int64))


@njit(nogil=True)
def tick(clock, part):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 — Numba infers them
    """Count the time since the last reading for `part`; 25 ns, where the kernel need not be asked."""
    _clock_gettime(clock.kind, clock.reading.ctypes.data)
    now = clock.reading[0] * SECOND + clock.reading[1]
    clock.spent[part] += now - clock.last[0]
    clock.last[0] = now
