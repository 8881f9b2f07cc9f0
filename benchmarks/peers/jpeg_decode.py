"""The bare decoder: libjpeg-turbo over the JPEGs of a `.beton`, whole images, on some threads, and nothing else.

No loader that decodes whole images on these cores can be faster. The threads are Python's; a call takes half a
millisecond and holds no lock, so their own cost does not show.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.contestant import Run
from pipelines.beton import open_beton
from pipelines.decode.turbojpeg import NUM_CHANNELS, PIXEL_FORMAT_RGBX, Decompressor, library


def jpeg_decode(path: Path, workers: int) -> Run:
    """Decode images in the order of the file, again and again."""
    beton = open_beton(path)
    decompress = library().tjDecompress2
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    decompress.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, integer, integer, integer, integer, integer]
    samples = list(zip(beton.offsets.tolist(), beton.sizes.tolist(), beton.widths.tolist(), strict=True))
    heights = beton.heights.tolist()
    largest = int((beton.widths.astype(np.int64) * beton.heights).max()) * NUM_CHANNELS
    lanes = [(Decompressor(), np.empty(largest, np.uint8)) for _ in range(workers)]
    executor = ThreadPoolExecutor(workers)

    def decode(lane: int, rows: Iterator[int]) -> None:
        """Take rows, which all lanes share, until none are left."""
        decompressor, pixels = lanes[lane]
        for i in rows:
            row = i % beton.num_samples
            offset, size, width = samples[row]
            failed = decompress(
                decompressor.handle,
                beton.data.ctypes.data + offset,
                size,
                pixels.ctypes.data,
                width,
                width * NUM_CHANNELS,
                heights[row],
                PIXEL_FORMAT_RGBX,
                0,
            )
            if failed:
                raise ValueError(f"sample {row} of {path} cannot be decoded: {decompressor.last_error()}")

    def run(num_images: int) -> None:
        rows = iter(range(num_images))
        list(executor.map(decode, range(workers), itertools.repeat(rows, workers)))

    return run
