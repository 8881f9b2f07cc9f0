"""The whole way of some samples on the CPU: draw, decode once, cut V windows, and (for CPU training) colour them.

One nopython call a chunk of samples; it holds no lock, so threads run it side by side. Views are written into one flat
buffer: view v of sample i starts at `offsets[v] + i · strides[v]`, in HWC order.

A kernel stops at the first sample that it cannot decode and says where; the caller, who knows names and policy,
decides what happens next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from native.compiled import source_hash
from pipelines import draw_numba
from pipelines.beton_layout import MODE_RAW
from pipelines.decode.clock import CROP, DECODE, ELSEWHERE, PHOTOMETRIC, tick
from pipelines.decode.resample import pack, resized_crop, unpack
from pipelines.decode.rows import keep_rows
from pipelines.decode.turbojpeg import (
    LIMIT_SCANS,
    NUM_CHANNELS,
    PIXEL_FORMAT_RGBX,
    call_decompress,
    call_decompress_header,
    call_destroy,
    call_init,
)
from pipelines.draw_numba import draw
from pipelines.photometric import numba_kernels
from pipelines.photometric.numba_kernels import load_words, photometric_planes

OK, REFUSED, BAD_HEADER, WRONG_SIZE = 0, 1, 2, 3
"""What `render` says of the sample at which it stopped. Only REFUSED may leave complete pixels behind."""

SOURCES = (
    "pipelines.decode.kernel",
    "pipelines.decode.clock",
    "pipelines.decode.turbojpeg",
    "pipelines.decode.resample",
    "pipelines.decode.rows",
    "pipelines.beton_layout",
    *numba_kernels.SOURCES,
    *draw_numba.SOURCES,
)
"""The modules whose code is compiled into `render` and `unpack`."""


class Source(NamedTuple):
    """Where the encoded samples lie: the tables of a `.beton`, arrays by row, but for `data`."""

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
    """Where the first image's views begin in the flat output."""
    strides: NDArray[np.int64]
    """How far the next image's view begins behind an image's."""
    filters: NDArray[np.int64]
    """TRIANGLE or CUBIC of `pipelines.decode.resample`."""


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
    jpeg: NDArray[np.uint8]
    """[MAX_BYTES of `pipelines.decode.rows`]; a JPEG of the rows that are needed."""
    columns: NDArray[np.float32]
    packed: NDArray[np.uint32]
    firsts: NDArray[np.int32]
    counts: NDArray[np.int32]
    weights: NDArray[np.float32]
    planes: NDArray[np.float32]


@njit(nogil=True)
def decode(source, sample, reduction, top, bottom, turbojpeg, handles, scratch):
    """Decode one sample to RGBX.

    Args:
        source: `Source`.
        sample: row of the file; a JPEG of another size than the tables state is refused.
        reduction: 1, or 2 or 4: libjpeg-turbo's scaled decode of a JPEG to that fraction of its size.
        top: first row of the whole image that is needed; what lies elsewhere may be left undefined.
        bottom: one past the last.
        turbojpeg: addresses, `pipelines.decode.turbojpeg.TurboJPEG`.
        handles: int64 [1]; of a decompressor that no other thread uses; gets a fresh one.
        scratch: `Scratch`.

    Returns:
        OK, REFUSED or BAD_HEADER (libjpeg-turbo's last error says why; a mere warning while decoding leaves complete
        pixels) or WRONG_SIZE, and the image, uint8 [⌈height / reduction⌉, ⌈width / reduction⌉, 4].
    """
    encoded = source.data[source.offsets[sample] : source.offsets[sample] + source.sizes[sample]]
    width, height = -(-source.widths[sample] // reduction), -(-source.heights[sample] // reduction)
    num_pixels = height * width
    flat = scratch.pixels[: num_pixels * NUM_CHANNELS]
    image = flat.reshape(height, width, NUM_CHANNELS)
    if source.modes[sample] == MODE_RAW:
        pack(encoded[: 3 * num_pixels], flat)
        return OK, image
    # A fresh one for each image (0.5 µs): after a header that it refuses, a decompressor refuses sound images too, and
    # it lends one image's tables to the next that lacks them.
    call_destroy(turbojpeg.destroy, handles[0])
    handles[0] = call_init(turbojpeg.init)
    handle = handles[0]
    size, first_row, num_rows = keep_rows(
        encoded, source.widths[sample], source.heights[sample], top, bottom, scratch.jpeg
    )
    jpeg, header = encoded.ctypes.data, scratch.header.ctypes.data
    if size:
        jpeg = scratch.jpeg.ctypes.data
    else:
        size = encoded.size
    if call_decompress_header(
        turbojpeg.decompress_header, handle, jpeg, size, header, header + 4, header + 8, header + 12
    ):
        return BAD_HEADER, image
    if scratch.header[0] != source.widths[sample] or scratch.header[1] != num_rows:
        return WRONG_SIZE, image
    pitch = width * NUM_CHANNELS
    pixels = flat.ctypes.data + first_row // reduction * pitch
    height = -(-num_rows // reduction)
    target = pixels, width, pitch, height, PIXEL_FORMAT_RGBX, LIMIT_SCANS
    if call_decompress(turbojpeg.decompress, handle, jpeg, size, *target):
        return REFUSED, image
    return OK, image


@cache
def unpack_kernel() -> Callable[..., tuple[int, int]]:
    """The compiled `unpack`."""
    version = source_hash(*SOURCES)

    @njit(nogil=True, cache=True)
    def unpack(
        source, samples, table, epoch_key, params, begin, end, tolerant, turbojpeg, handles, scratch, starts, out
    ):
        """Draw the views of positions [begin, end) of a batch, and decode the images whole.

        Args, and what is returned, are those of `render`, but for:
            starts: int64 [N]; where each image begins in `out`.
            out: uint8, flat; each image as height × width × RGB; written.
        """
        _ = version  # in the closure, and so in the key of Numba's cache
        for i in range(begin, end):
            width, height = source.widths[samples[i]], source.heights[samples[i]]
            draw(table, epoch_key, samples[i], width, height, params[i])
            num = np.int64(3) * width * height
            target = out[starts[i] : starts[i] + num]
            if source.modes[samples[i]] == MODE_RAW:
                first = source.offsets[samples[i]]
                target[:] = source.data[first : first + num]
                continue
            status, image = decode(source, samples[i], 1, 0, height, turbojpeg, handles, scratch)
            if status != OK and not (status == REFUSED and tolerant):
                return i, status
            flat = image.reshape(-1)
            for p in range(num // 3):
                target[3 * p] = flat[NUM_CHANNELS * p]
                target[3 * p + 1] = flat[NUM_CHANNELS * p + 1]
                target[3 * p + 2] = flat[NUM_CHANNELS * p + 2]
        return end, OK

    return unpack  # type: ignore[no-any-return]


@njit(nogil=True)
def _reduction(views, sizes):
    """The scale at which every window is still at least as large as its view: 1, 2 or 4."""
    spare = np.inf
    for v in range(sizes.size):
        spare = min(spare, views[v].height / sizes[v], views[v].width / sizes[v])
    return 4 if spare >= 4.0 else (2 if spare >= 2.0 else 1)


@njit(nogil=True)
def _rows(views):
    """The first row that some window has, and one past the last."""
    top, bottom = views[0].top, views[0].top + views[0].height
    for v in range(1, views.size):
        top, bottom = min(top, views[v].top), max(bottom, views[v].top + views[v].height)
    return top, bottom


@njit(nogil=True)
def _crop(image, kind, view, reduction, size, scratch):
    scale = 1.0 / reduction
    resized_crop(
        image,
        kind,
        view.top * scale,
        view.left * scale,
        view.height * scale,
        view.width * scale,
        view.flip,
        size,
        scratch.columns,
        scratch.packed,
        scratch.firsts,
        scratch.counts,
        scratch.weights,
    )


@cache
def render_kernel() -> Callable[..., tuple[int, int]]:
    """The compiled `render`."""
    version = source_hash(*SOURCES)

    @njit(nogil=True, cache=True)
    def render(
        source,
        samples,
        table,
        epoch_key,
        params,
        begin,
        end,
        tolerant,
        scaled,
        turbojpeg,
        handles,
        scratch,
        layout,
        coloring,
        out,
        clock,
    ):
        """Draw, decode and write the views of positions [begin, end) of a batch.

        Args:
            source: `Source`.
            samples: int64 [N]; rows of the file.
            table: `RECIPE_TABLE` [V].
            epoch_key: uint64, `rng.key_of(seed, epoch)`.
            params: `VIEW_PARAMS` [N, V]; written.
            begin: first position in the batch.
            end: one past the last.
            tolerant: accept the pixels of a JPEG of which libjpeg-turbo complained.
            scaled: decode JPEGs at half or quarter scale where no window becomes smaller than its view.
            turbojpeg: as for `decode`.
            handles: as for `decode`.
            scratch: `Scratch`.
            layout: `Layout`.
            coloring: `Coloring`: `out` gets finished views; or None: `out` gets crops.
            out: flat; float32 for finished views, uint8 for crops; written.
            clock: `Clock` of `pipelines.decode.clock`, which adds up what each part takes; or None.

        Returns:
            `end` and OK; or the position of the first sample that could not be decoded, and why.
        """
        _ = version  # in the closure, and so in the key of Numba's cache
        for i in range(begin, end):
            if clock is not None:
                tick(clock, ELSEWHERE)
            draw(table, epoch_key, samples[i], source.widths[samples[i]], source.heights[samples[i]], params[i])
            reduction = 1
            if scaled and source.modes[samples[i]] != MODE_RAW:
                reduction = _reduction(params[i], layout.sizes)
            top, bottom = _rows(params[i])
            status, image = decode(source, samples[i], reduction, top, bottom, turbojpeg, handles, scratch)
            if status != OK and not (status == REFUSED and tolerant):
                return i, status
            if clock is not None:
                tick(clock, DECODE)
            for v in range(layout.sizes.size):
                size, view = layout.sizes[v], params[i, v]
                num = size * size * 3
                start = layout.offsets[v] + i * layout.strides[v]
                target = out[start : start + num].reshape(size, size, 3)
                _crop(image, layout.filters[v], view, reduction, size, scratch)
                if clock is not None:
                    tick(clock, CROP)
                if coloring is None:
                    unpack(scratch.packed, target.reshape(-1))
                else:
                    planes = scratch.planes[: 4 * size * size].reshape(4, size * size)
                    load_words(scratch.packed, planes)
                    photometric_planes(
                        planes[:3],
                        planes[3],
                        view,
                        coloring.kernel_sizes[v],
                        coloring.mean,
                        coloring.std,
                        target,
                    )
                if clock is not None:
                    tick(clock, CROP if coloring is None else PHOTOMETRIC)
        return end, OK

    return render  # type: ignore[no-any-return]
