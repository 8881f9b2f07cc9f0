"""Whether the images of a `.beton` can be decoded in the memory that there is; its tables say what that takes."""

from __future__ import annotations

import numpy as np

from pipelines.beton import MODE_RAW, Beton
from pipelines.buffers import free_host_memory

RAW_BYTES = 4  # a pixel takes: RGBX
JPEG_BYTES = 10  # likewise, and the coefficients of all three channels, which a progressive JPEG keeps, 16 bits each


def check_images_fit(beton: Beton, num_threads: int) -> None:
    """Refuse a file whose largest images, decoded on so many threads at a time, exceed the free memory.

    Raises:
        ValueError: they do; one line.
    """
    num_pixels = beton.widths.astype(np.int64) * beton.heights
    num_bytes = num_pixels * np.where(beton.modes == MODE_RAW, RAW_BYTES, JPEG_BYTES)
    free, num = free_host_memory(), min(num_threads, beton.num_samples)
    if int(num_bytes.max()) * num <= free:
        return
    needed = int(np.partition(num_bytes, -num)[-num:].sum())
    if needed > free:
        i = int(num_pixels.argmax())
        raise ValueError(
            f"{beton.path}: sample {i} has {beton.widths[i]}×{beton.heights[i]} pixels; to decode the largest images "
            f"on {num} threads takes {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; lower "
            "`data.num_threads`, or convert the images anew with a `--max-side`"
        )
