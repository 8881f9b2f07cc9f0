"""Checkpoints: everything a run needs to go on, in one safetensors file that is whole or is not there.

Tensors are named `model.<key>` and `optimizer.<parameter name>.<slot>`. The file's metadata holds JSON texts:
the position in the run, the resolved configuration, package versions, and what identifies the data; and a
CRC-32 over those texts, the tensors' names, types and shapes, and their bytes. There is no pickle, so loading
runs no code, and no random state, since every random number of a run follows from its seed and position.

A checkpoint is written under a temporary name in its own folder, flushed to the disk, and renamed: whatever
happens in between, the previous file of that name stays whole. Content is values: strides are not kept, and
tensors that share memory are stored once under each name.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

FORMAT = "twinview-checkpoint"
VERSION = 1
PARTIAL_SUFFIX = ".partial"
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
SECTIONS = ("position", "config", "versions", "loader")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run between two steps. Dictionaries other than tensors hold what JSON can express."""

    model: dict[str, Tensor]
    """The method's `state_dict()`."""
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """`{parameter name: {slot: tensor}}`, as `train.optim.param_groups.state_by_name` gives it."""
    position: dict[str, Any] = field(default_factory=dict)
    """Where the run stands: `step`, and whatever else the loop counts."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions that wrote it."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Where the loader stands, and what identifies its data and their order."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that `path` is, at every moment, the old file or the new one.

    One process at a time may save into a folder: remains of a killed save are removed here.

    Raises:
        OSError: it could not be written, for instance because the disk is full; nothing is left behind.
    """
    tensors = _named_tensors(checkpoint)
    metadata = {"format": FORMAT, "version": str(VERSION)}
    metadata |= {section: json.dumps(getattr(checkpoint, section), sort_keys=True) for section in SECTIONS}
    metadata["crc32"] = _checksum(metadata, tensors)

    path.parent.mkdir(parents=True, exist_ok=True)
    for remains in path.parent.glob(f".*{PARTIAL_SUFFIX}"):
        remains.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        _write_safetensors(partial, tensors, metadata)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"checkpoint {path} could not be written ({error.strerror}); the previous one is untouched"
            ) from error
        raise
    _flush_folder(path.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into CPU memory and prove it against its checksum.

    Raises:
        ValueError: there is no such file, or it is not a checkpoint, is damaged, or has a newer format.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; give the path of a file in `checkpoints/` of a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        _check_format(path, metadata)
        # Not `file.get_tensor`: its tensors lie in a map of the file, which must not vanish under them.
        tensors = load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a checkpoint, or was cut off or damaged ({_one_line(error)}); resume from another one"
        ) from error
    if metadata.pop("crc32", None) != _checksum(metadata, tensors):
        raise ValueError(f"{path} is damaged: its content does not match its checksum; resume from another one")

    model: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part == "model":
            model[key] = tensor
        else:
            parameter, _, slot = key.rpartition(".")
            optimizer.setdefault(parameter, {})[slot] = tensor
    sections = {section: json.loads(metadata[section]) for section in SECTIONS}
    return Checkpoint(model=model, optimizer=optimizer, **sections)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint taken after `step` steps."""
    return run_dir / "checkpoints" / f"step-{step:09d}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; only finished files bear these names."""
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step-*.safetensors")
        if (match := re.fullmatch(r"step-(\d+)\.safetensors", path.name))
    }
    return [found[step] for step in sorted(found)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(run_dir)), None)


def prune_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Delete all checkpoints of a run but the `keep_last` newest ones."""
    if keep_last < 1:
        raise ValueError(f"`keep_last` must be at least 1, got {keep_last}")
    for path in list_checkpoints(run_dir)[:-keep_last]:
        path.unlink()


def _named_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors under their names in the file, on the host and contiguous."""
    named = {f"model.{key}": tensor for key, tensor in checkpoint.model.items()}
    for parameter, slots in checkpoint.optimizer.items():
        named |= {f"optimizer.{parameter}.{slot}": tensor for slot, tensor in slots.items()}
    for name, tensor in named.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"a checkpoint cannot hold `{name}` of {tensor.dtype}; split or convert it")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """CRC-32 over everything that a checkpoint says, independent of the order in the file."""
    names = sorted(tensors)
    layout = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    crc = zlib.crc32(json.dumps([metadata, layout], sort_keys=True).encode())
    for name in names:
        crc = zlib.crc32(_bytes_of(tensors[name]), crc)
    return f"{crc:08x}"


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a checkpoint of a Twinview run; "
            "give a file that `train/pretrain.py` wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path} has checkpoint format {metadata.get('version')}, this Twinview reads {VERSION}; update Twinview"
        )


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the file, and wait until it is on the disk.

    Not by the library's `save_file`, which writes under a random name of its own that a kill leaves behind,
    and gives access to the owner alone. The format is the length of a JSON header, the header, and the bytes
    of the tensors without gaps; wide types come first, so that every tensor is aligned.
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
            file.write(_bytes_of(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _flush_folder(path: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
