"""A `.beton` that is being changed, and where everything lies in it.

It is changed in place and put back: a case costs what its change costs, however long the file is.
"""

import os
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines.beton_layout import (
    ALLOCATION_DTYPE,
    FIELD_DTYPE,
    HEADER_DTYPE,
    IMAGE_FIELD,
    MODE_JPEG,
    metadata_dtype,
)


class Sample:
    """Where a sample and what the tables say of it lie in the file."""

    def __init__(self, data, row, mode, start, size, image_at, pointer_at, allocation_at):
        self.row, self.mode, self.start, self.size = row, mode, start, size
        self.image_at, self.pointer_at, self.allocation_at = image_at, pointer_at, allocation_at
        self.segments = list(_segments(data, start, start + size)) if mode == MODE_JPEG else []


class Draft:
    """A file of the corpus that is being changed."""

    def __init__(self, path: Path):
        self.path, self.base = path, path.read_bytes()
        self.data = bytearray(self.base)
        self._length = len(self.base)
        self._edits: list[tuple[int, int]] = []
        self._tail = b""
        self._file = os.open(path, os.O_RDWR)
        self._find_structure()

    def _find_structure(self):
        header = np.frombuffer(self.base, HEADER_DTYPE, 1)[0]
        num, num_fields, table = (int(header[name]) for name in ("num_samples", "num_fields", "alloc_table_ptr"))
        at = HEADER_DTYPE.itemsize
        descriptors = np.frombuffer(self.base, FIELD_DTYPE, num_fields, at)
        type_ids = [int(type_id) for type_id in descriptors["type_id"]]
        metadata = at + num_fields * FIELD_DTYPE.itemsize
        row = metadata_dtype(type_ids)
        image_at = row.fields[f"f{type_ids.index(IMAGE_FIELD)}"][1]
        rows = np.frombuffer(self.base, row, num, metadata)[f"f{type_ids.index(IMAGE_FIELD)}"]
        allocations = np.frombuffer(self.base, ALLOCATION_DTYPE, -1, table)
        self.metadata, self.row_size, self.table, self.num_allocations = metadata, row.itemsize, table, len(allocations)
        self.samples = []
        for i in range(num):
            entry = int(np.flatnonzero(allocations["ptr"] == rows[i]["data_ptr"])[-1])
            start, size = int(rows[i]["data_ptr"]), int(allocations[entry]["size"])
            at_image, at_entry = metadata + i * row.itemsize + image_at, table + entry * ALLOCATION_DTYPE.itemsize
            self.samples.append(
                Sample(self.base, i, int(rows[i]["mode"]), start, size, at_image, at_image + 5, at_entry)
            )
        self.numbers = {
            "header": _members(HEADER_DTYPE, 0),
            "descriptors": [(at + i * FIELD_DTYPE.itemsize, 1) for i in range(num_fields)],
            "metadata": [member for i in range(min(num, 8)) for member in _members(row, metadata + i * row.itemsize)],
            "allocations": [
                member
                for i in range(min(len(allocations), 8))
                for member in _members(ALLOCATION_DTYPE, table + i * ALLOCATION_DTYPE.itemsize)
            ],
        }
        end = max(sample.start + sample.size for sample in self.samples)
        first = min(sample.start for sample in self.samples)
        self.first, self.end = first, end
        self.boundaries = [0, HEADER_DTYPE.itemsize, metadata, metadata + num * row.itemsize, first, end, table]
        self.boundaries += [len(self.base), *(sample.start for sample in self.samples)]

    @cached_property
    def jpegs(self):
        return [sample for sample in self.samples if sample.segments]

    def put(self, position, content):
        """Overwrite; what would lie beyond the end is left out."""
        content = content[: max(len(self.base) - position, 0)]
        if content:
            self.data[position : position + len(content)] = content
            self._edits.append((position, len(content)))

    def number(self, position, size):
        return int.from_bytes(self.data[position : position + size], "little")

    def put_number(self, position, size, value):
        self.put(position, (value % (1 << (8 * size))).to_bytes(size, "little"))

    def resize(self, length, tail=b""):
        self._length, self._tail = max(length, 0), tail

    def content(self):
        """The changed file."""
        return bytes(self.data[: self._length]) + self._tail

    def commit(self):
        """Change the file."""
        for position, size in self._edits:
            os.pwrite(self._file, self.data[position : position + size], position)
        if self._length < len(self.base):
            os.ftruncate(self._file, self._length)
        if self._tail:
            os.pwrite(self._file, self._tail, self._length)

    def undo(self):
        """Put the file back."""
        for position, size in self._edits:
            self.data[position : position + size] = self.base[position : position + size]
            os.pwrite(self._file, self.base[position : position + size], position)
        if self._length < len(self.base):
            os.pwrite(self._file, self.base[self._length :], self._length)
        if self._tail or self._length != len(self.base):
            os.ftruncate(self._file, len(self.base))
        self._edits, self._length, self._tail = [], len(self.base), b""


def _members(dtype, at):
    """(position, size) of the numbers of a struct, those of structs in it included."""
    found = []
    for kind, offset, *_ in dtype.fields.values():
        found += _members(kind, at + offset) if kind.fields else [(at + offset, kind.itemsize)]
    return found


def _segments(data, start, end):
    """(marker, position, length) of a JPEG's segments, those behind its scans too."""
    at = start + 2
    while at + 4 <= end:
        if data[at] != 0xFF or data[at + 1] in (0, 0xFF, *range(0xD0, 0xDA)):
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], at, length
        at += 2 + length
