"""The bytes of a `.beton` file: FFCV's format, version 2, which stock FFCV reads and writes.

    header │ a descriptor per field │ metadata, a row per sample │ padding │ data pages │ allocation table

A metadata row is a C struct with one member a field, aligned as numpy aligns it; an image's member holds its
mode, its size and the file offset of its bytes. The allocation table runs to the end of the file and says how
many bytes lie at each offset. No sample crosses a page boundary, so that FFCV can cache whole pages. All
numbers are little-endian. Source: `ffcv/types.py`, `ffcv/writer.py` and `ffcv/fields/*.py` of FFCV 1.0.2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MODE_JPEG = 0
MODE_RAW = 1  # height × width × 3 bytes, RGB, row by row
MAX_SIDE = 65535  # widths and heights are 16-bit

PIXELS_PER_BYTE = 512  # of a JPEG, at most: a Huffman code has at least a bit for each block of 8 × 8
BLANK_PIXELS = 2**26  # that any JPEG may have: an arithmetic coder needs next to nothing for a blank page

MIN_PAGE_SIZE = 1 << 21  # FFCV's limits: a huge page below, a 32-bit number above
MAX_PAGE_SIZE = 1 << 31
DEFAULT_PAGE_SIZE = 1 << 23

HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_DTYPE = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True)
ALLOCATION_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_DTYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
BYTES_DTYPE = np.dtype([("ptr", "<u8"), ("size", "<u8")])

INT_FIELD = 1
IMAGE_FIELD = 2
FIELD_METADATA: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f8"),  # FloatField
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE_DTYPE,
    3: BYTES_DTYPE,  # BytesField
    4: np.dtype("<u8"),  # NDArrayField: a pointer; shape and type stand in the field's arguments
    5: BYTES_DTYPE,  # JSONField
    6: np.dtype("<u8"),  # TorchTensorField, as NDArrayField
}


def metadata_dtype(type_ids: Sequence[int]) -> np.dtype[Any]:
    """The struct of one metadata row for fields of these types, with members named `f0`, `f1` and so on."""
    return np.dtype([("", FIELD_METADATA[type_id]) for type_id in type_ids], align=True)


def most_pixels(num_bytes: Any) -> Any:
    """The most pixels that a JPEG of so many bytes, a number or an array, is believed to have."""
    return np.maximum(BLANK_PIXELS, num_bytes * PIXELS_PER_BYTE)


def align_up(position: int, page_size: int) -> int:
    """The first page boundary at or after `position`."""
    return -(-position // page_size) * page_size
