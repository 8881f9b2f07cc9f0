"""Call libjpeg-turbo from Numba kernels, by address.

FFCV's extension module is linked against libjpeg-turbo, so the library that FFCV decodes with is found through it: one
decoder in the process, and no search path of our own. Addresses travel as *arguments* of the kernels, never as
constants in them, so that compiled kernels can be cached on disk and shared by processes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

PIXEL_FORMAT_RGB, PIXEL_FORMAT_RGBX, PIXEL_FORMAT_GRAY = 0, 2, 6  # TJPF_*
LIMIT_SCANS = 32768  # TJFLAG_LIMITSCANS: at most 500 of a progressive JPEG, which may repeat them without end
TOO_MANY_SCANS = "more than 500 scans"
ANOTHER_SIZE = "its size is not the one in the file's table"
_JUNK_AT_THE_END = "extraneous bytes before marker 0xd9"
_RESTART_INTERVAL = b"\xff\xdd\x00\x04"  # begins the segment that announces restart markers
NUM_CHANNELS = 4  # of RGBX: four bytes a pixel keep the resampler's vectors aligned


class TurboJPEG(NamedTuple):
    """Addresses of the functions that kernels call."""

    init: int
    destroy: int
    decompress_header: int
    decompress: int


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The libjpeg-turbo that FFCV is linked against.

    Raises:
        OSError: FFCV is not installed, or its extension cannot be loaded.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = list(spec.submodule_search_locations or []) if spec else []
    extensions = [path for folder in folders for path in Path(folder).glob("_libffcv*.so")]
    if not extensions:
        raise OSError("`ffcv` is needed to decode JPEGs and was not found; install requirements.txt")
    turbojpeg = ctypes.CDLL(str(extensions[0]))
    turbojpeg.tjInitDecompress.restype = ctypes.c_void_p
    turbojpeg.tjDestroy.argtypes = [ctypes.c_void_p]
    turbojpeg.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    turbojpeg.tjGetErrorStr2.restype = ctypes.c_char_p
    return turbojpeg


def addresses() -> TurboJPEG:
    """The addresses that kernels take as arguments."""
    names = ("tjInitDecompress", "tjDestroy", "tjDecompressHeader3", "tjDecompress2")
    return TurboJPEG(*map(_address, names))


class Decompressor:
    """One libjpeg-turbo handle; not to be shared between threads.

    Attributes:
        handles: int64 [1]; the handle, as kernels take it: they put a fresh one in its place for each image.
    """

    def __init__(self) -> None:
        self.handles = np.array([library().tjInitDecompress()], np.int64)
        weakref.finalize(self, _destroy, self.handles)

    @property
    def handle(self) -> int:
        """The handle's address."""
        return int(self.handles[0])

    def renew(self) -> None:
        """Put a fresh handle in the place of this one, as is done for each image.

        After a header that it refuses, a decompressor refuses sound images too, and it lends one image's tables to the
        next that lacks them.
        """
        self.close()
        self.handles[0] = library().tjInitDecompress()

    def decompress(
        self,
        jpeg: NDArray[np.uint8],
        width: int,
        height: int,
        out: NDArray[np.uint8],
        pixel_format: int,
        scale: int = 1,
    ) -> str | None:
        """Decode a JPEG; other Python threads run meanwhile.

        Args:
            jpeg: uint8 [bytes].
            width: that the image must have, pixels.
            height: likewise.
            out: uint8, contiguous; written: ⌈height / scale⌉ rows of ⌈width / scale⌉ pixels.
            pixel_format: one of PIXEL_FORMAT_*.
            scale: 1, 2, 4 or 8.

        Returns:
            None, or the reason why it is not the image that it should be.
        """
        self.renew()
        turbojpeg, handle = library(), ctypes.c_void_p(self.handle)
        source = ctypes.c_void_p(jpeg.ctypes.data), ctypes.c_ulong(jpeg.size)
        found = [ctypes.c_int() for _ in range(4)]  # width, height, subsampling, colour space
        if turbojpeg.tjDecompressHeader3(handle, *source, *map(ctypes.byref, found)):
            return self.last_error()
        if (found[0].value, found[1].value) != (width, height):
            return ANOTHER_SIZE
        target = ctypes.c_void_p(out.ctypes.data)
        size = -(-width // scale), 0, -(-height // scale)
        if turbojpeg.tjDecompress2(handle, *source, target, *size, pixel_format, LIMIT_SCANS):
            reason = self.last_error()
            return None if is_harmless(reason, jpeg) else reason
        return None

    def last_error(self) -> str:
        """What libjpeg-turbo said of the last image that it refused or complained of."""
        return str(library().tjGetErrorStr2(self.handle).decode(errors="replace"))

    def close(self) -> None:
        """Free the handle."""
        _destroy(self.handles)


def _destroy(handles: NDArray[np.int64]) -> None:
    if handles[0]:
        library().tjDestroy(int(handles[0]))
        handles[0] = 0


def is_harmless(warning: str, jpeg: bytes | NDArray[np.uint8]) -> bool:
    """Whether every pixel was decoded although libjpeg-turbo complained: there was only junk before the end's marker.

    Nothing of the file comes after it, and Pillow takes the same pixels. (They may be wrong: damage that throws the
    entropy decoder off its course without stopping it looks the same.) libjpeg-turbo remembers the first warning alone,
    so junk before any other marker may hide worse damage. So may this one where there are restart markers: the decoder
    goes on to the next of them, or to the end, with gray in the place of what is missing.
    """
    return _JUNK_AT_THE_END in warning and _RESTART_INTERVAL not in bytes(jpeg)


def _address(name: str) -> int:
    address = ctypes.cast(getattr(library(), name), ctypes.c_void_p).value
    assert address is not None
    return address


_POINTER = ir.IntType(64)  # a pointer and a 64-bit integer travel in the same registers
_INT = ir.IntType(32)


def _emit_call(builder: Any, values: Sequence[Any], argument_types: Sequence[ir.Type]) -> Any:
    """Emit `((int (*)(...)) values[0])(values[1:])`, narrowing each argument to the type that C declares."""
    function_type = ir.FunctionType(_INT, argument_types)
    function = builder.inttoptr(values[0], function_type.as_pointer())
    arguments = [
        value if kind == _POINTER else builder.trunc(value, kind)
        for value, kind in zip(values[1:], argument_types, strict=True)
    ]
    return builder.call(function, arguments)


@intrinsic
def call_init(typing_context, address):
    """`tjInitDecompress`; returns the handle's address, or 0."""

    def generate(context, builder, signature, values):
        function = builder.inttoptr(values[0], ir.FunctionType(_POINTER, []).as_pointer())
        return builder.call(function, [])

    return types.intp(types.intp), generate


@intrinsic
def call_destroy(typing_context, address, handle):
    """`tjDestroy`; returns 0, or −1."""

    def generate(context, builder, signature, values):
        return _emit_call(builder, values, [_POINTER])

    return types.int32(*[types.intp] * 2), generate


@intrinsic
def call_decompress_header(
    typing_context,
    address,
    handle,
    jpeg,
    size,
    width,
    height,
    subsampling,
    colorspace,
):
    """`tjDecompressHeader3`; all arguments are intp, pointers as addresses. Returns 0, or −1."""

    def generate(context, builder, signature, values):
        return _emit_call(builder, values, [_POINTER] * 7)

    return types.int32(*[types.intp] * 8), generate


@intrinsic
def call_decompress(
    typing_context,
    address,
    handle,
    jpeg,
    size,
    out,
    width,
    pitch,
    height,
    pixel_format,
    flags,
):
    """`tjDecompress2`; all arguments are intp, pointers as addresses. Returns 0, or −1 (an error or a warning)."""

    def generate(context, builder, signature, values):
        return _emit_call(builder, values, [_POINTER] * 4 + [_INT] * 5)

    return types.int32(*[types.intp] * 10), generate
