"""Reads the headers of a tar file that nobody vouches for: ustar, pax and GNU long names, by Python's `tarfile`.

`tarfile` alone stops in silence at a damaged header in the middle, and reads as much as an extended header asks for.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_HEADER_BYTES = 1 << 20  # of one long name or extended header; real ones have a few hundred


def tar_members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar file in its order; data lie at `offset_data`, within the file.

    Args:
        file: the open tar file.
        path: its name, for messages.

    Raises:
        ValueError: it is no tar file, damaged, or ends too early.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    damaged = f"{path} is damaged or cut short"
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            position = 0
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= position:
                    raise ValueError(f"{damaged}: member {member.name!r} states a size of {member.size}; get it anew")
                position = tar.offset
                if member.offset_data + member.size > num_bytes:
                    raise ValueError(
                        f"{damaged}: member {member.name!r} states {member.size} bytes at {member.offset_data}, the "
                        f"file has {num_bytes}; get it anew"
                    )
                yield member
                tar.members.clear()  # type: ignore[attr-defined] # or a shard's headers would all be kept
            position = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} must be a tar file, whole and uncompressed: {error}") from error
    except (UnicodeError, OverflowError, MemoryError, IndexError, KeyError, TypeError) as error:  # odd pax headers
        raise ValueError(f"{damaged}: {error}; get it anew") from error
    ending = os.pread(file.fileno(), tarfile.BLOCKSIZE, position)
    if ending != bytes(tarfile.BLOCKSIZE):
        found = "nothing" if not ending else "no header"
        raise ValueError(f"{damaged}: expected a member or the end mark at byte {position}, found {found}; get it anew")


class _Headers(io.RawIOBase):
    """What `tarfile` sees of the file: never more at a time than a header may have."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header states {size} bytes, more than {MAX_HEADER_BYTES}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
