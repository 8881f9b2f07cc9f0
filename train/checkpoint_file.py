"""Read and write safetensors files: the length of a JSON header, the header, and the bytes of the tensors.

Not by the library's `save_file`, which writes under a random name of its own that a kill leaves behind, and gives
access to the owner alone; nor by its `load_file`, which maps the file: a disk that fails under a map kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TensorReader = Callable[[BufferedReader, dict[str, Any]], dict[str, Tensor]]

MAX_HEADER_BYTES = 100_000_000  # the library's limit
DTYPE_NAMES = {  # as safetensors spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size: what NumPy takes, bit for bit


class TornFile(Exception):
    """A file that is no safetensors file, or not all of one."""


def read_safetensors(
    path: Path, check: Callable[[dict[str, str]], None], read: TensorReader
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Args:
        path: of a regular file.
        check: is called with the metadata before anything else is read, and may raise.
        read: `read_tensors`, or `read_nothing`.

    Raises:
        TornFile: as said.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise TornFile("its metadata are no texts")
        check(metadata)
        _check_entries(header, os.fstat(file.fileno()).st_size - file.tell())
        return metadata, read(file, header)


def read_nothing(file: BufferedReader, entries: dict[str, Any]) -> dict[str, Tensor]:
    """Of a file whose tensors are not wanted."""
    return {}


def read_tensors(file: BufferedReader, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that follow in a file, as its header lists them, in memory of their own."""
    begin = file.tell()
    tensors = {}
    for name, entry in entries.items():
        tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        content = bytes_of(tensors[name])
        file.seek(begin + entry["data_offsets"][0])
        if file.readinto(content) != len(content):
            raise TornFile(f"it ends inside `{name}`")
    return tensors


def _read_header(file: BufferedReader) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise TornFile(f"{size} bytes cannot hold a header of {length}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise TornFile(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise TornFile("its header is no dictionary")
    return header


def _check_entries(entries: dict[str, Any], num_bytes: int) -> None:
    """Tensors must follow one another without gaps up to the end of the file, each as long as it says."""
    spans = []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
                dtype in DTYPES
                and all(isinstance(side, int) and 0 <= side <= num_bytes for side in shape)
                and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
            ):
                spans.append((begin, end))
            case _:
                raise TornFile(f"its header does not describe `{name}`")
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise TornFile(f"there is a gap, or an overlap, at byte {reached} of its tensors")
        reached = end
    if reached != num_bytes:
        raise TornFile(f"its tensors take {reached} bytes and it holds {num_bytes}")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the file, and wait until it is on the disk.

    The tensors follow without gaps; wide types come first, so that every tensor is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        dtype = DTYPE_NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(bytes_of(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order: its own memory, where it lies so on the host."""
    content: memoryview = np.ascontiguousarray(as_integers(tensor.cpu())).reshape(-1).view(np.uint8).data
    return content


def as_integers(tensor: Tensor) -> Any:
    """A tensor of the host as NumPy sees its memory, whatever its type.

    What is copied by NumPy is copied by the calling thread: torch would wake as many threads as it computes with, for
    each of hundreds of tensors.
    """
    return tensor.view(INTEGERS[tensor.element_size()]).numpy()


def flush_folder(path: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
