"""Representations on disk: computed once, proven at every use, read through a memory map.

A file holds the features of one set by one network, `features` float32 [n, D] and `labels` int64 [n], as safetensors.
Its metadata hold the key, in full, that its name is a digest of, and CRC-32s of the contents; nothing in it runs code.
It is written piece by piece while features are computed, under a temporary name, and renamed when it is whole.

A file that is torn, or of another version of the format, is named in a warning and made anew. One that holds features
of something else than its name says was put there by someone: it is refused.

Legend: n samples, D width of the representation.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.checkpoint_file import TornFile, flush_folder, read_safetensors

FORMAT = "twinview-features"
VERSION = 1
PIECE_BYTES = 2**26  # of a map that are read at a time
UNKNOWN_CRC = "--------"  # as long as a real one, which takes its place in the end

logger = logging.getLogger(__name__)

Key = dict[str, Any]
"""Everything that features depend on; JSON values."""


class _Outdated(Exception):
    """A file of another version of the format."""


def cache_path(folder: Path, key: Key) -> Path:
    """Where features of this key are kept."""
    return folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.safetensors"


def read_features(path: Path, key: Key) -> tuple[Tensor, Tensor] | None:
    """Features float32 [n, D], mapped, and labels int64 [n]; None where there are none, or none that are whole.

    What is written into the features stays in this process.

    Raises:
        ValueError: the file holds something else than features, or those of another key.
        OSError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        metadata, tensors = read_safetensors(path, lambda found: _check_key(path, found, key), _map_tensors)
        if set(tensors) != {"features", "labels"}:
            raise TornFile(f"it holds {sorted(tensors)}")
        for name, tensor in tensors.items():
            if metadata.get(f"crc32_{name}") != f"{_checksum(tensor.numpy()):08x}":
                raise TornFile(f"its {name} do not match their checksum")
    except TornFile as error:
        logger.warning("%s is torn or damaged (%s); its features are made anew", path, " ".join(str(error).split()))
        return None
    except _Outdated as error:
        logger.warning("%s is of format %s, today's is %s; its features are made anew", path, error, VERSION)
        return None
    return tensors["features"], tensors["labels"].clone()


class FeatureWriter:
    """Writes one file of features; a context that leaves nothing half-written behind.

    Args:
        path: from `cache_path`.
        key: likewise.
        labels: int64 [n].

    Raises:
        OSError: there is no place for it.
    """

    def __init__(self, path: Path, key: Key, labels: NDArray[np.int64]) -> None:
        self._path, self._key, self._labels = path, key, np.ascontiguousarray(labels, np.int64)
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_remains(path)
            self._file = _open_locked(self._partial)
        self._width: int | None = None
        self._num_rows = self._crc = 0

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of what is thrown away
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def append(self, values: Tensor) -> None:
        """The next samples' features, float32 [m, D] on the CPU.

        Raises:
            OSError: the disk is full, or otherwise does not take them.
        """
        content = np.ascontiguousarray(values.numpy(), np.float32)
        with self._explained():
            if self._width is None:
                self._width = content.shape[1]
                self._require_room()
                self._file.write(self._header(UNKNOWN_CRC))
                self._file.write(self._labels.data)
            self._file.write(content.data)
            self._file.flush()
        self._crc = zlib.crc32(content.data, self._crc)
        self._num_rows += len(content)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Give the file its name, and read it.

        Raises:
            OSError: the disk does not take it.
        """
        assert self._num_rows == len(self._labels), "a row of features for each label"
        with self._explained():
            self._file.seek(0)
            self._file.write(self._header(f"{self._crc:08x}"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
            flush_folder(self._path.parent)
            _, tensors = read_safetensors(self._path, lambda _: None, _map_tensors)
        return tensors["features"], tensors["labels"].clone()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which file an error is about, and what can be done."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._path} could not be written ({error.strerror or error}); make room, or evaluate with "
                "`--cache false`"
            ) from error

    def _header(self, crc: str) -> bytes:
        assert self._width is not None
        end = len(self._labels) * 8
        shape = [len(self._labels), self._width]
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "key": _text(self._key),
            "crc32_labels": f"{_checksum(self._labels):08x}",
            "crc32_features": crc,
        }
        header = {
            "__metadata__": metadata,
            "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, end]},
            "features": {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * shape[0] * shape[1]]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _require_room(self) -> None:
        assert self._width is not None
        needed, free = len(self._labels) * (8 + 4 * self._width), shutil.disk_usage(self._path.parent).free
        if needed > free:
            raise OSError(f"features take {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _check_key(path: Path, metadata: dict[str, str], key: Key) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} must hold cached features, got a safetensors file of something else; remove it")
    if metadata.get("version") != str(VERSION):
        raise _Outdated(metadata.get("version"))
    try:
        found = json.loads(metadata["key"])
    except (KeyError, ValueError, RecursionError) as error:
        raise TornFile(f"it has no key: {error}") from error
    if found != key:
        found = found if isinstance(found, dict) else {}
        name = next((name for name in key if found.get(name) != key[name]), "key")
        raise ValueError(
            f"{path} must hold features of `{name}` {key.get(name)}, got those of {found.get(name)}: it was made of "
            "something else and renamed or copied here; remove it"
        )


def _map_tensors(file: BufferedReader, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, as private maps of it."""
    begin = file.tell()
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in ("F32", "I64"):
            raise TornFile(f"`{name}` is of type {entry['dtype']}")
        dtype = np.dtype(np.float32 if entry["dtype"] == "F32" else np.int64)
        shape, offset = tuple(entry["shape"]), begin + entry["data_offsets"][0]
        if 0 in shape:
            raise TornFile(f"`{name}` is empty")
        tensors[name] = torch.from_numpy(np.memmap(file, dtype, mode="c", offset=offset, shape=shape))
    return tensors


def _checksum(array: NDArray[Any]) -> int:
    content, crc = array.reshape(-1).view(np.uint8), 0
    for start in range(0, len(content), PIECE_BYTES):
        crc = zlib.crc32(content[start : start + PIECE_BYTES].data, crc)
    return crc


def _open_locked(path: Path) -> BufferedWriter:
    """A new file that no other process takes for remains."""
    while True:
        file = path.open("xb")
        with suppress(OSError):  # a file system without locks: remains of a killed process stay there
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # removed by another process that began meanwhile, before it was locked


def _remove_remains(path: Path) -> None:
    """Remove what killed processes left of this file; one that is being written is locked, and stays."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
