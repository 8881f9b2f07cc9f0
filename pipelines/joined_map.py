"""Several files mapped behind one another into one array of bytes, so that compiled code sees a single file.

The kernel's page cache serves it as any memory map: nothing is read before it is touched, nothing is copied. Between
the end of a file and the next page lie bytes that no offset leads to.

Linux alone: address space is reserved first, then each file is mapped over its part of it.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value


class JoinedMap(NamedTuple):
    """What `map_joined` returns."""

    data: NDArray[np.uint8]
    """Read-only; the map ends with the array and its views."""
    starts: list[int]
    """Where in it each file begins: multiples of the page size."""
    statuses: list[os.stat_result]
    """Of the files that are mapped."""


def map_joined(files: Sequence[tuple[Path, int]]) -> JoinedMap:
    """Map files behind one another; no file stays open, however many there are.

    Args:
        files: where they lie, and how many bytes of each are to be mapped, at least 1.

    Raises:
        OSError: the system refuses.
    """
    starts, total = [], 0
    for _, num_bytes in files:
        starts.append(total)
        total += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    libc = _libc()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _checked(libc.mmap(None, total, 0, flags, -1, 0))
    buffer = (ctypes.c_uint8 * total).from_address(base)
    weakref.finalize(buffer, libc.munmap, base, total)
    statuses = []
    for (path, num_bytes), start in zip(files, starts, strict=True):
        with path.open("rb") as file:
            statuses.append(os.fstat(file.fileno()))
            flags = mmap.MAP_SHARED | _MAP_FIXED
            _checked(libc.mmap(base + start, num_bytes, mmap.PROT_READ, flags, file.fileno(), 0))
    data: NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
    data.flags.writeable = False
    return JoinedMap(data, starts, statuses)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _checked(address: int | None) -> int:
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address
