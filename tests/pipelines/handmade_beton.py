"""A `.beton` put together byte by byte with `struct`, independently of the code under test."""

import struct
from dataclasses import dataclass, field

HEADER = struct.Struct("<HHIQQ")
DESCRIPTOR = struct.Struct("<B16s1024s")
ALLOCATION = struct.Struct("<QQQ")


@dataclass
class Sample:
    """One image of the file, and what the tables say of it."""

    data: bytes
    width: int
    height: int
    mode: int = 0
    label: int = 0


@dataclass
class HandmadeBeton:
    """Image and label; `parts` says where each part of `data` begins."""

    samples: list[Sample]
    page_size: int = 1 << 12  # FFCV itself writes no less than 2 MiB
    data: bytes = b""
    parts: dict[str, int] = field(default_factory=dict)

    def build(self) -> "HandmadeBeton":
        n = len(self.samples)
        metadata_start = HEADER.size + 2 * DESCRIPTOR.size
        # mode, width, height, pointer are packed in 13 bytes; the 64-bit label is aligned to 8.
        metadata = struct.Struct("<BHHQ3xq")
        position = -(-(metadata_start + n * metadata.size) // self.page_size) * self.page_size
        data_start = position
        rows, table, content = b"", b"", b""
        for i, sample in enumerate(self.samples):
            rows += metadata.pack(sample.mode, sample.width, sample.height, position, sample.label)
            table += ALLOCATION.pack(i, position, len(sample.data))
            content += sample.data
            position += len(sample.data)
        table_start = -(-position // self.page_size) * self.page_size
        head = HEADER.pack(2, 2, self.page_size, n, table_start)
        head += DESCRIPTOR.pack(2, b"image", b"") + DESCRIPTOR.pack(1, b"label", b"")
        self.data = (head + rows).ljust(data_start, b"\0") + content
        self.data = self.data.ljust(table_start, b"\0") + table
        self.parts = {
            "header": 0,
            "fields": HEADER.size,
            "metadata": metadata_start,
            "data": data_start,
            "table": table_start,
            "end": len(self.data),
        }
        return self


def three_samples() -> HandmadeBeton:
    """A JPEG (by its table; the reader does not decode), a raw 2×3 image, and another JPEG."""
    return HandmadeBeton(
        [
            Sample(b"\xff\xd8jpeg one\xff\xd9", width=640, height=480, label=7),
            Sample(bytes(range(18)), width=2, height=3, mode=1, label=-1),
            Sample(b"\xff\xd8and two\xff\xd9", width=65535, height=1, label=2**40),
        ]
    ).build()
