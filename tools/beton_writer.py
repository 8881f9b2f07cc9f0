"""Writes a `.beton` front to back, for stock FFCV and for us to read.

Unlike FFCV's own writer it takes encoded samples, in order, from one thread, so equal samples give an equal
file. Room for the tables at the front is reserved for the most samples there can be; they are filled in at
the end, when it is known how many came. A page grows when a sample needs it: boundaries of the larger page
are boundaries of the smaller one too, so earlier samples stay inside theirs.

What the tables will say is one record a sample (`ROW_DTYPE`). From the records of the samples that lie in an
unfinished file the writer goes on as if it had never stopped.
"""

import os
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

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

ROW_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("index", "<u4"),  # of the image in its source
        ("label", "<i4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("mode", "u1"),
        ("kept", "u1"),
        ("unused", "<u2"),
    ]
)
BUFFER_BYTES = 1 << 20  # a system call for every small sample would make the encoding threads wait for Python's lock
TABLE_CHUNK = 1 << 18  # rows of the tables that are made at a time


class BetonWriter:
    """Appends samples to an open, empty, seekable file; `finish` makes it a `.beton`."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        capacity: int,
        labelled: bool,
        page_size: int = DEFAULT_PAGE_SIZE,
        rows: NDArray[np.void] | None = None,
    ) -> None:
        """Reserves room for the tables of `capacity` samples, each with a label if `labelled`.

        Args:
            file: the file. Its end is cut off where it goes on.
            capacity: samples at most.
            labelled: whether there is a label field.
            page_size: bytes, a power of two.
            rows: `ROW_DTYPE`: samples that the file holds, of a writer with the same settings.
        """
        check_page_size(page_size)
        self.page_size = page_size
        self.capacity = capacity
        self.num_samples = 0
        self._file = file
        self._fields = {"image": IMAGE_FIELD, "label": INT_FIELD} if labelled else {"image": IMAGE_FIELD}
        self._row_dtype = metadata_dtype(list(self._fields.values()))
        self._table = np.zeros(capacity, ROW_DTYPE)  # touched, and so in memory, only as far as it is filled
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self._position = 0
        if rows is None or not rows.size:
            file.seek(0)
            file.truncate()
            tables = HEADER_DTYPE.itemsize + len(self._fields) * FIELD_DTYPE.itemsize
            self._pad_to(align_up(tables + capacity * self._row_dtype.itemsize, page_size))
        else:
            self._go_on(rows)

    @property
    def rows(self) -> NDArray[np.void]:
        """`ROW_DTYPE` [num_samples]: what was added."""
        return self._table[: self.num_samples]

    def add(self, image: EncodedImage, label: int | None = None, index: int = 0) -> None:
        """Takes one sample; ValueError if it exceeds the largest page, and then nothing is written.

        Args:
            image: the sample.
            label: its class.
            index: of the image in its source.
        """
        size = len(image.data)
        if size > MAX_PAGE_SIZE:
            raise ValueError(f"a sample may have {MAX_PAGE_SIZE} bytes at most, got {size}")
        offset, self.page_size = self._place(size)
        self._pad_to(offset)
        self._table[self.num_samples] = (
            *(offset, size, image.crc32, index, -1 if label is None else label),
            *(image.width, image.height, image.mode, image.kept, 0),
        )
        self._write(image.data)
        self.num_samples += 1

    def bytes_with(self, size: int) -> int:
        """How long the finished file would be with one more sample of so many bytes."""
        offset, page_size = self._place(size)
        return align_up(offset + size, page_size) + (self.num_samples + 1) * ALLOCATION_DTYPE.itemsize

    def flush(self) -> None:
        """Hands everything that was added to the system."""
        write_all(self._file, b"".join(self._waiting))
        self._waiting.clear()
        self._num_waiting = 0

    def finish(self) -> None:
        """Writes the tables and waits until the file is on the disk."""
        self._pad_to(align_up(self._position, self.page_size))
        self.flush()
        for start in range(0, self.num_samples, TABLE_CHUNK):
            rows = self.rows[start : start + TABLE_CHUNK]
            allocations = np.zeros(rows.size, ALLOCATION_DTYPE)
            allocations["sample_id"] = np.arange(start, start + rows.size)
            allocations["ptr"], allocations["size"] = rows["offset"], rows["size"]
            write_all(self._file, allocations.tobytes())
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
        write_all(self._file, header.tobytes() + descriptors.tobytes())
        for start in range(0, self.num_samples, TABLE_CHUNK):
            write_all(self._file, self._metadata(self.rows[start : start + TABLE_CHUNK]).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _metadata(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        # Member by member: the struct has padding, which must be zero.
        metadata = np.zeros(rows.size, self._row_dtype)
        for member, column in (("mode", "mode"), ("width", "width"), ("height", "height"), ("data_ptr", "offset")):
            metadata["f0"][member] = rows[column]
        if "label" in self._fields:
            metadata["f1"] = rows["label"]
        return metadata

    def _place(self, size: int) -> tuple[int, int]:
        """Where a sample of so many bytes would begin, and the page size with it."""
        page_size = self.page_size
        while page_size < size:
            page_size *= 2
        if self._position % page_size + size > page_size:
            return align_up(self._position, page_size), page_size
        return self._position, page_size

    def _go_on(self, rows: NDArray[np.void]) -> None:
        self.num_samples = rows.size
        self._table[: rows.size] = rows
        while self.page_size < int(rows["size"].max()):
            self.page_size *= 2
        self._position = int(rows["offset"][-1]) + int(rows["size"][-1])
        self._file.truncate(self._position)
        self._file.seek(self._position)

    def _pad_to(self, position: int) -> None:
        # A hole would do, but then a full disk would be met at a reader's page fault instead of here.
        while self._position < position:
            self._write(bytes(min(position - self._position, BUFFER_BYTES)))

    def _write(self, data: bytes) -> None:
        self._waiting.append(data)
        self._num_waiting += len(data)
        self._position += len(data)
        if self._num_waiting >= BUFFER_BYTES:
            self.flush()


def write_all(file: BinaryIO, data: Any) -> None:
    """Writes all of `data`, also to an unbuffered file, which may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


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
