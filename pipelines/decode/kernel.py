"""The whole way of some samples on the CPU: decode once, cut V windows, and (for CPU training) colour them.

One nopython call a chunk of samples; it holds no lock, so threads run it side by side. Views are written into one flat
buffer: view v of sample i starts at `offsets[v] + i · size² · 3`, in HWC order, which is a channels_last batch.

A kernel stops at the first sample that it cannot decode and says where; the caller, who knows names and policy,
decides what happens next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.decode import resample
from pipelines.decode import turbojpeg as turbojpeg_calls
from pipelines.decode.resample import resized_crop
from pipelines.decode.turbojpeg import (
    NUM_CHANNELS,
    PIXEL_FORMAT_RGBX,
    call_decompress,
    call_decompress_header,
)
from pipelines.photometric import numba_kernels
from pipelines.photometric.numba_kernels import photometric_image

OK, REFUSED, BAD_HEADER, WRONG_SIZE = 0, 1, 2, 3
"""What `render` says of the sample at which it stopped. Only REFUSED may leave complete pixels behind."""

MODE_RAW = 1  # of the .beton: height × width × RGB bytes


class Source(NamedTuple):
    """Where a batch's encoded samples lie; arrays by position in the batch, but for `data`."""

    data: NDArray[np.uint8]
    """The whole file."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    modes: NDArray[np.uint8]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]


class Layout(NamedTuple):
    """Where views go: arrays [V]."""

    sizes: NDArray[np.int64]
    """Side of each view, pixels."""
    offsets: NDArray[np.int64]
    """First element of each view's block in the flat output."""


class Coloring(NamedTuple):
    """What the photometric chain needs beside the drawn parameters."""

    kernel_sizes: NDArray[np.int64]
    """[V]; width of the blur, odd."""
    mean: NDArray[np.float32]
    """[3]."""
    std: NDArray[np.float32]
    """[3]."""


class Scratch(NamedTuple):
    """One thread's working memory; see `pipelines.pool` for the sizes."""

    pixels: NDArray[np.uint8]
    """The decoded image, RGBX."""
    header: NDArray[np.int32]
    """[4]; what the JPEG says of itself."""
    row: NDArray[np.float32]
    firsts: NDArray[np.int32]
    counts: NDArray[np.int32]
    weights: NDArray[np.float32]
    crop: NDArray[np.uint8]
    planes: NDArray[np.float32]


@njit(nogil=True, cache=True)
def decode(encoded, mode, width, height, turbojpeg, handle, scratch):
    """Decode one sample to RGBX.

    Args:
        encoded: uint8 [bytes].
        mode: MODE_RAW, or anything else for a JPEG.
        width: that the file's tables state; a JPEG of another size is refused.
        height: likewise.
        turbojpeg: addresses, `pipelines.decode.turbojpeg.TurboJPEG`.
        handle: of a decompressor that no other thread uses.
        scratch: `Scratch`.

    Returns:
        OK, REFUSED or BAD_HEADER (libjpeg-turbo's last error says why; a mere warning while decoding leaves complete
        pixels) or WRONG_SIZE, and the image, uint8 [height, width, 4].
    """
    num_pixels = height * width
    flat = scratch.pixels[: num_pixels * NUM_CHANNELS]
    image = flat.reshape(height, width, NUM_CHANNELS)
    if mode == MODE_RAW:
        for i in range(num_pixels):
            for c in range(3):
                flat[i * NUM_CHANNELS + c] = encoded[i * 3 + c]
        return OK, image
    jpeg, header = encoded.ctypes.data, scratch.header.ctypes.data
    if call_decompress_header(
        turbojpeg.decompress_header, handle, jpeg, encoded.size, header, header + 4, header + 8, header + 12
    ):
        return BAD_HEADER, image
    if scratch.header[0] != width or scratch.header[1] != height:
        return WRONG_SIZE, image
    pitch = width * NUM_CHANNELS
    if call_decompress(
        turbojpeg.decompress,
        handle,
        jpeg,
        encoded.size,
        flat.ctypes.data,
        width,
        pitch,
        height,
        PIXEL_FORMAT_RGBX,
        0,
    ):
        return REFUSED, image
    return OK, image


@njit(nogil=True, cache=True)
def _crop(image, view, out, scratch):
    resized_crop(
        image,
        view.top,
        view.left,
        view.height,
        view.width,
        view.flip,
        out,
        scratch.row,
        scratch.firsts,
        scratch.counts,
        scratch.weights,
    )


@cache
def render_kernel() -> Callable[..., tuple[int, int]]:
    """The compiled `render`.

    Numba's cache on disk knows a kernel by its own file and closure. The functions that are compiled into this one
    come from other files, whose content is therefore put into its closure: an update never meets old machine code.
    """
    sources = [str(module.__file__) for module in (turbojpeg_calls, resample, numba_kernels)]
    version = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()

    @njit(nogil=True, cache=True)
    def render(source, params, begin, end, tolerant, turbojpeg, handle, scratch, layout, coloring, out):
        """Decode samples [begin, end) of a batch, and write all views of each.

        Args:
            source: `Source`.
            params: `VIEW_PARAMS` [N, V].
            begin: first position in the batch.
            end: one past the last.
            tolerant: accept the pixels of a JPEG of which libjpeg-turbo complained.
            turbojpeg: as for `decode`.
            handle: as for `decode`.
            scratch: `Scratch`.
            layout: `Layout`.
            coloring: `Coloring`: `out` gets finished views; or None: `out` gets crops.
            out: flat; float32 for finished views, uint8 for crops; written.

        Returns:
            `end` and OK; or the position of the first sample that could not be decoded, and why.
        """
        _ = version  # in the closure, and so in the key
        for i in range(begin, end):
            encoded = source.data[source.offsets[i] : source.offsets[i] + source.sizes[i]]
            status, image = decode(
                encoded, source.modes[i], source.widths[i], source.heights[i], turbojpeg, handle, scratch
            )
            if status != OK and not (status == REFUSED and tolerant):
                return i, status
            for v in range(layout.sizes.size):
                size, view = layout.sizes[v], params[i, v]
                num = size * size * 3
                start = layout.offsets[v] + i * num
                target = out[start : start + num].reshape(size, size, 3)
                if coloring is None:
                    _crop(image, view, target, scratch)
                else:
                    crop = scratch.crop[:num].reshape(size, size, 3)
                    _crop(image, view, crop, scratch)
                    planes = scratch.planes[: 4 * size * size].reshape(4, size * size)
                    photometric_image(
                        crop,
                        view,
                        coloring.kernel_sizes[v],
                        coloring.mean,
                        coloring.std,
                        planes[:3],
                        planes[3],
                        target,
                    )
        return end, OK

    return render  # type: ignore[no-any-return]
