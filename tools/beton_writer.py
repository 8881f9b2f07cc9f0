"""Writes a `.beton` front to back, for stock FFCV and for us to read.

Unlike FFCV's own writer it takes encoded samples, in order, from one thread, so equal samples give an equal
file. Room for the tables at the front is reserved for the most samples there can be; they are filled in at
the end, when it is known how many came. A page grows when a sample needs it: boundaries of the larger page
are boundaries of the smaller one too, so earlier samples stay inside theirs.
"""

import os
from typing import BinaryIO

import numpy as np

from pipelines.beton_layout import (
    ALLOCATION_DTYPE,
    DEFAULT_PAGE_SIZE,
    FIELD_DTYPE,
    FORMAT_VERSION,
    HEADER_DTYPE,
    IMAGE_FIELD,
    INT_FIELD,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    align_up,
    metadata_dtype,
)
from tools.image_encoding import EncodedImage


class BetonWriter:
    """Appends samples to an open, empty, seekable file; `finish` makes it a `.beton`."""

    def __init__(self, file: BinaryIO, *, capacity: int, labelled: bool, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """Reserves room for the tables of `capacity` samples, each with a label if `labelled`."""
        check_page_size(page_size)
        self.page_size = page_size
        self.num_samples = 0
        self._file = file
        self._fields = {"image": IMAGE_FIELD, "label": INT_FIELD} if labelled else {"image": IMAGE_FIELD}
        self._metadata = np.zeros(capacity, metadata_dtype(list(self._fields.values())))
        self._allocations = np.zeros(capacity, ALLOCATION_DTYPE)
        tables = HEADER_DTYPE.itemsize + len(self._fields) * FIELD_DTYPE.itemsize + self._metadata.nbytes
        self._position = 0
        self._pad_to(align_up(tables, page_size))

    def add(self, image: EncodedImage, label: int | None = None) -> None:
        """Writes one sample; ValueError if it exceeds the largest page, and then nothing is written."""
        size = len(image.data)
        if size > MAX_PAGE_SIZE:
            raise ValueError(f"a sample may have {MAX_PAGE_SIZE} bytes at most, got {size}")
        while self.page_size < size:
            self.page_size *= 2
        if self._position % self.page_size + size > self.page_size:
            self._pad_to(align_up(self._position, self.page_size))
        row = self.num_samples
        # Member by member: the struct has padding, which a tuple would leave unwritten.
        metadata = self._metadata[row]
        metadata["f0"] = (image.mode, image.width, image.height, self._position)
        if label is not None:
            metadata["f1"] = label
        self._allocations[row] = (row, self._position, size)
        self._file.write(image.data)
        self._position += size
        self.num_samples += 1

    def finish(self) -> None:
        """Writes the tables and waits until the file is on the disk."""
        self._pad_to(align_up(self._position, self.page_size))
        self._file.write(self._allocations[: self.num_samples].tobytes())
        header = np.zeros((), HEADER_DTYPE)
        header["version"] = FORMAT_VERSION
        header["num_fields"] = len(self._fields)
        header["page_size"] = self.page_size
        header["num_samples"] = self.num_samples
        header["alloc_table_ptr"] = self._position
        descriptors = np.zeros(len(self._fields), FIELD_DTYPE)
        for descriptor, (name, type_id) in zip(descriptors, self._fields.items(), strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + descriptors.tobytes() + self._metadata[: self.num_samples].tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _pad_to(self, position: int) -> None:
        # A hole would do, but then a full disk would be met at a reader's page fault instead of here.
        self._file.write(bytes(position - self._position))
        self._position = position


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless FFCV accepts it."""
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"`page_size` must be a power of two, {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE} bytes, got {page_size}"
        )


def forecast_bytes(num_samples: int, mean_size: float, *, labelled: bool, page_size: int) -> int:
    """About how long a `.beton` of samples of this mean size becomes."""
    types = [IMAGE_FIELD, INT_FIELD] if labelled else [IMAGE_FIELD]
    tables = num_samples * (metadata_dtype(types).itemsize + ALLOCATION_DTYPE.itemsize) + page_size
    usable = max(page_size - mean_size / 2, page_size / 2)  # a sample that does not fit leaves half its size empty
    return tables + align_up(int(num_samples * mean_size * page_size / usable), page_size)
