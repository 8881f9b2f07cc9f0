"""The journal of a conversion: what was done, beside the file that is being written, so that a killed one goes on.

Blocks are appended and reach the disk one after the other, each after the samples that it speaks of. Each has its
length and checksum; at the first that is not whole the journal ends, so that one torn by a power cut loses that block
alone. The first block says of what conversion it is. While the journal is open no other process opens it.

Shapes: n rows.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tools.beton_writer import ROW_DTYPE, write_all
from tools.whole_file import locked_file

Kind = Literal["begin", "open", "rows", "done"]
KINDS: tuple[Kind, ...] = ("begin", "open", "rows", "done")
_HEAD = struct.Struct("<4sIIQQ")  # magic, checksum of all that follows, kind, bytes of the words, bytes of the rows
_MAGIC = b"TvJ1"
_NO_ROWS = np.zeros(0, ROW_DTYPE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """An entry of the journal."""

    kind: Kind
    """begin: which conversion; open: a file was begun; rows: images were done; done: a file is whole."""
    words: dict[str, Any]
    """What it says, as JSON."""
    rows: NDArray[np.void] = field(default_factory=lambda: _NO_ROWS)
    """`ROW_DTYPE` [n]: samples, appended to the file that was begun last."""

    def to_bytes(self) -> bytes:
        """The block as it lies in the file."""
        words, rows = json.dumps(self.words).encode(), self.rows.tobytes()
        return _whole(struct.pack("<IQQ", KINDS.index(self.kind), len(words), len(rows)) + words + rows)


class Journal:
    """An open journal, which no other process writes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Takes an open, unbuffered file."""
        self.path = path
        self._file = file
        self._end = 0

    def blocks(self) -> Iterator[Block]:
        """Reads all whole blocks; what is appended later follows the last one that was read.

        Raises:
            ValueError: the file is no journal.
        """
        self._file.seek(0)
        start = self._file.read(len(_MAGIC))
        if not _MAGIC.startswith(start):
            raise ValueError(
                f"{self.path}: expected the journal of an unfinished conversion, found another file; move it away"
            )
        self._end = 0
        num_bytes = os.fstat(self._file.fileno()).st_size
        while (block := self._read(num_bytes)) is not None:
            self._end = self._file.tell()
            yield block

    def append(self, block: Block) -> None:
        """Adds a block behind those that were read, and waits until it is on the disk."""
        self._file.seek(self._end)
        self._file.truncate()
        try:
            write_all(self._file, block.to_bytes())
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end = self._file.tell()

    def clear(self) -> None:
        """Forgets everything."""
        self._file.truncate(0)
        self._end = 0

    def remove(self) -> None:
        """Takes the file away: the conversion is done."""
        self.path.unlink()

    @property
    def is_empty(self) -> bool:
        """Whether the file is."""
        return os.fstat(self._file.fileno()).st_size == 0

    def _read(self, num_bytes: int) -> Block | None:
        self._file.seek(self._end)
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, checksum, kind, num_words, num_rows = _HEAD.unpack(head)
        if magic != _MAGIC or num_words + num_rows > num_bytes - self._end - _HEAD.size:
            return None
        body = self._file.read(num_words + num_rows)
        if zlib.crc32(body, zlib.crc32(head[8:])) != checksum:
            return None
        return Block(
            kind=KINDS[kind],
            words=json.loads(body[:num_words]),
            rows=np.frombuffer(body, ROW_DTYPE, offset=num_words),
        )


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Opens a journal, or begins one; at the end of the block it is removed if it holds nothing.

    Raises:
        ValueError: another conversion holds it.
    """
    with locked_file(path, buffering=0) as file:
        journal = Journal(path, file)
        try:
            yield journal
        finally:
            if journal.is_empty:
                path.unlink(missing_ok=True)


def _whole(body: bytes) -> bytes:
    return _MAGIC + struct.pack("<I", zlib.crc32(body)) + body
