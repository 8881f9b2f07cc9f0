"""Reads a `.beton`: its tables, checked to the last offset, and a memory map of its bytes.

Nothing that the file says is believed before it is compared with the file's length, so that a foreign, torn
or half-written file ends in one `BetonError` that names it, never in a crash or an allocation of untrusted
size. What the tables cannot show (a flipped bit inside a JPEG) is for `tools.verify` to find.

A set in shards is one `Beton` as well: the files are mapped behind one another, and its tables are theirs in a row.

Shapes: n samples.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.beton_layout import HEADER_DTYPE, MODE_JPEG, MODE_RAW
from pipelines.beton_tables import BetonError, read_tables
from pipelines.joined_map import map_joined
from pipelines.shard_index import Shard, ShardIndexError, is_shard_index, load_shard_index

__all__ = ["MODE_JPEG", "MODE_RAW", "Beton", "BetonError", "Stamp", "open_beton"]


class Stamp(NamedTuple):
    """A file as it was opened."""

    path: Path
    device: int
    inode: int
    num_bytes: int
    written_ns: int
    """When it was last written to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Beton:
    """An open `.beton`, or a set in shards. Its arrays are read-only."""

    path: Path
    """Of the file, or of the shards' index."""
    num_samples: int
    page_size: int
    modes: NDArray[np.uint8]
    """uint8 [n]: MODE_JPEG or MODE_RAW."""
    widths: NDArray[np.int32]
    """int32 [n], pixels."""
    heights: NDArray[np.int32]
    """int32 [n], pixels."""
    offsets: NDArray[np.int64]
    """int64 [n]: where in `data` the sample's bytes begin."""
    sizes: NDArray[np.int64]
    """int64 [n]: how many bytes they are."""
    labels: NDArray[np.int64] | None
    """int64 [n], or None where the file has no integer field."""
    data: NDArray[np.uint8]
    """uint8: the whole file, memory-mapped; or all shards, each from a page's begin on."""
    stamps: tuple[Stamp, ...]
    """The file, or each shard."""

    def encoded(self, i: int) -> NDArray[np.uint8]:
        """The stored bytes of sample `i`, as a view of the map: a JPEG file, or rows of RGB."""
        start = int(self.offsets[i])
        return self.data[start : start + int(self.sizes[i])]

    def check_unchanged(self) -> None:
        """Refuse a file that was written to or cut since it was opened: a look at its status, microseconds.

        To touch a page of the map that the file no longer has kills the process (SIGBUS), hence loaders look before
        each batch. A file that was removed, or that another took the place of by a rename, stays whole where it is
        mapped.

        Raises:
            BetonError: it was.
        """
        for stamp in self.stamps:
            try:
                found = _stamp(stamp.path, stamp.path.stat())
            except OSError:
                continue
            if found[:3] == stamp[:3] and found != stamp:
                bytes_differ = found.num_bytes != stamp.num_bytes
                how = f"it had {stamp.num_bytes} bytes and has {found.num_bytes}" if bytes_differ else "in its place"
                raise BetonError(
                    f"{stamp.path}: changed while it was being read ({how}); start again with a whole file, and put a "
                    "new one in the place of one in use by renaming it"
                )


def open_beton(path: str | Path) -> Beton:
    """Opens a `.beton` written by `tools.convert` or by FFCV.

    The first RGB image field is the image and the first integer field, if any, the label; other fields are
    passed over.

    Raises:
        BetonError: the file is missing, empty, foreign, torn, or states what cannot be true of it.
    """
    path = Path(path)
    if is_shard_index(path):
        return _open_shards(path)
    if not path.exists():
        raise BetonError(f"{path}: no such file; make one with `python -m tools.convert`")
    try:
        with _opened(path) as file:
            stamp = _stamp(path, os.fstat(file.fileno()))
            data = _map(file, stamp.num_bytes)
            return Beton(path=path, data=data, stamps=(stamp,), **read_tables(data)._asdict())
    except BetonError as error:
        raise BetonError(f"{path}: {error}; convert the images anew with `python -m tools.convert`") from None
    except OSError as error:
        raise BetonError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open_shards(path: Path) -> Beton:
    """The shards of an index as one set."""
    try:
        index = load_shard_index(path)
    except ShardIndexError as error:
        raise BetonError(str(error)) from None
    parts = [_open_shard(index.path, shard) for shard in index.shards]
    if len({part.labels is None for part in parts}) > 1:
        raise BetonError(f"{path}: some of its shards have labels and some have none; convert the images anew")
    data, starts, statuses = map_joined([(shard.path, shard.num_bytes) for shard in index.shards])
    stamps = tuple(_stamp(shard.path, status) for shard, status in zip(index.shards, statuses, strict=True))
    if stamps != tuple(stamp for part in parts for stamp in part.stamps):
        raise BetonError(f"{path}: its shards changed while they were being opened; start again with whole files")

    def column(name: str) -> NDArray[Any]:
        joined: NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])
        joined.flags.writeable = False
        return joined

    offsets = np.concatenate([part.offsets + start for part, start in zip(parts, starts, strict=True)])
    offsets.flags.writeable = False
    return replace(
        parts[0],
        path=path,
        num_samples=index.num_samples,
        page_size=max(part.page_size for part in parts),
        modes=column("modes"),
        widths=column("widths"),
        heights=column("heights"),
        offsets=offsets,
        sizes=column("sizes"),
        labels=None if parts[0].labels is None else column("labels"),
        data=data,
        stamps=stamps,
    )


def _open_shard(index: Path, shard: Shard) -> Beton:
    """Its tables, checked; without a map of its bytes, which would hold the file open."""
    if not shard.path.exists():
        raise BetonError(
            f"{index}: its shard {shard.path} is not there; if it was moved, write its new place into the index"
        )
    beton = open_beton(shard.path)
    found = {"bytes": beton.data.size, "samples": beton.num_samples}
    for what, expected in (("bytes", shard.num_bytes), ("samples", shard.num_samples)):
        if found[what] != expected:
            raise BetonError(
                f"{index}: its shard {shard.path} has {found[what]} {what}, not {expected}: it is another file; bring "
                "the right one back, or convert the images anew"
            )
    return replace(beton, data=beton.data[:0].copy())


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise BetonError("expected a .beton file, found something that is no regular file")
    return path.open("rb")


def _map(file: BinaryIO, num_bytes: int) -> NDArray[np.uint8]:
    if num_bytes < HEADER_DTYPE.itemsize:
        raise BetonError(f"expected a .beton file, found {num_bytes} bytes, too few for a header")
    return np.memmap(file, dtype=np.uint8, mode="r", shape=(num_bytes,))


def _stamp(path: Path, status: os.stat_result) -> Stamp:
    return Stamp(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
