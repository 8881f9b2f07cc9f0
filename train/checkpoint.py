"""Checkpoints: everything a run needs to go on, in one safetensors file that is whole or is not there.

Tensors are named `model.<key>`, `optimizer.<parameter name>.<slot>`, `average.<key>` (a moving average of the model)
and `probe.<key>` (what watches the encoder). The file's metadata holds JSON texts: the position in the run, the
resolved configuration, package versions, and what identifies the data; and a CRC-32 over those texts, the tensors'
names, types and shapes, and their bytes. There is no pickle, so loading runs no code, and no random state, since every
random number of a run follows from its seed and position. Version 1 of the format had no `average` and no `probe`.

A checkpoint is written under a temporary name in its own folder, flushed to the disk, and renamed: whatever
happens in between, the previous file of that name stays whole. Content is values: strides are not kept, and
tensors that share memory are stored once under each name.
"""

from __future__ import annotations

import errno
import json
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint_file import (
    DTYPE_NAMES,
    TensorReader,
    TornFile,
    bytes_of,
    flush_folder,
    read_nothing,
    read_safetensors,
    read_tensors,
    write_safetensors,
)

FORMAT = "twinview-checkpoint"
VERSION = 2
READABLE_VERSIONS = ("1", "2")
PARTIAL_SUFFIX = ".partial"
PARTS = ("model", "optimizer", "average", "probe")
SECTIONS = ("position", "config", "versions", "loader")
PICKLES = (b"PK\x03\x04", b"\x80\x02")  # how files of `torch.save` begin, today's and the old ones


class DamagedCheckpoint(ValueError):
    """The file was, or may have been, a checkpoint, and is not whole: an older one may be."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run between two steps. Dictionaries other than tensors hold what JSON can express."""

    model: dict[str, Tensor]
    """The method's `state_dict()`."""
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """`{parameter name: {slot: tensor}}`, as `train.optim.param_groups.state_by_name` gives it."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of `model`, with the same keys; empty without one."""
    probe: dict[str, Tensor] = field(default_factory=dict)
    """The state of what watches the encoder during training; empty without it."""
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

    Raises:
        OSError: it could not be written, for instance because the disk is full; nothing is left behind.
        ValueError: a tensor of a type that no file can hold.
    """
    write_checkpoint(path, named_tensors(checkpoint), section_texts(checkpoint))


def named_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, not copied, under their names in the file.

    Raises:
        ValueError: one is of a type that no file can hold.
    """
    named = {f"model.{key}": tensor for key, tensor in checkpoint.model.items()}
    for parameter, slots in checkpoint.optimizer.items():
        named |= {f"optimizer.{parameter}.{slot}": tensor for slot, tensor in slots.items()}
    named |= {f"average.{key}": tensor for key, tensor in checkpoint.average.items()}
    named |= {f"probe.{key}": tensor for key, tensor in checkpoint.probe.items()}
    for name, tensor in named.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"a checkpoint cannot hold `{name}` of {tensor.dtype}; split or convert it")
    return {name: tensor.detach() for name, tensor in named.items()}


def section_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint holds beside its tensors, as JSON texts."""
    return {section: json.dumps(getattr(checkpoint, section), sort_keys=True) for section in SECTIONS}


def write_checkpoint(path: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Write what `named_tensors` and `section_texts` gave; see `save_checkpoint`.

    One process at a time may write into a folder: remains of a killed one are removed here. Takes memory for the
    largest tensor, and computes on the calling thread alone.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    metadata = {"format": FORMAT, "version": str(VERSION)} | texts
    metadata["crc32"] = _checksum(metadata, tensors)
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        _make_folder(path.parent)
        for remains in path.parent.glob(f".*{PARTIAL_SUFFIX}"):
            remains.unlink(missing_ok=True)
        write_safetensors(partial, tensors, metadata)
        partial.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise OSError(
            f"checkpoint {path} could not be written ({error.strerror or error}); the previous one is untouched"
        ) from error
    except BaseException:
        _remove(partial)
        raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into CPU memory and prove it against its checksum.

    Raises:
        DamagedCheckpoint: the file is not whole.
        ValueError: there is no such file, or it cannot be read, is something else, or has a newer format.
    """
    metadata, tensors = _read(path, read_tensors)
    if metadata.pop("crc32", None) != _checksum(metadata, tensors):
        raise DamagedCheckpoint(f"{path} is damaged: its content does not match its checksum; resume from another one")
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part not in parts:
            raise ValueError(f"{path} holds a tensor `{name}`, which no checkpoint of a Twinview run has")
        parts[part][key] = tensor
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in parts.pop("optimizer").items():
        parameter, _, slot = key.rpartition(".")
        optimizer.setdefault(parameter, {})[slot] = tensor
    return Checkpoint(optimizer=optimizer, **parts, **_parse_sections(path, metadata))


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says beside its tensors (`SECTIONS`): from the file's beginning, not proven by its checksum.

    Raises:
        DamagedCheckpoint: the file was cut off, or its beginning is damaged.
        ValueError: as `load_checkpoint`.
    """
    metadata, _ = _read(path, read_nothing)
    return _parse_sections(path, metadata)


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


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """CRC-32 over everything that a checkpoint says, independent of the order in the file."""
    names = sorted(tensors)
    layout = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    crc = zlib.crc32(json.dumps([metadata, layout], sort_keys=True).encode())
    for name in names:
        crc = zlib.crc32(bytes_of(tensors[name]), crc)
    return f"{crc:08x}"


def _read(path: Path, read: TensorReader) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A checkpoint's metadata and tensors, not proven yet."""
    if not path.exists() and not path.is_symlink():
        raise ValueError(f"there is no checkpoint {path}; give the path of a file in `checkpoints/` of a run")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a file in `checkpoints/` of a run")
    try:
        return read_safetensors(path, lambda metadata: _check_format(path, metadata), read)
    except TornFile as error:
        if _first_bytes(path).startswith(PICKLES):
            raise ValueError(
                f"{path} is a pickle, as `torch.save` writes it, and not a checkpoint of a Twinview run; pickles can "
                "run code and are not opened; `python -m tools.import_checkpoint` reads encoders of other programs"
            ) from error
        raise DamagedCheckpoint(_damaged(path, error)) from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedCheckpoint(_damaged(path, error)) from error
        raise ValueError(f"{path} could not be read ({error.strerror or error})") from error


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a checkpoint of a Twinview run; "
            "give a file that `train/pretrain.py` wrote"
        )
    if metadata.get("version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path} has checkpoint format {metadata.get('version')}, this Twinview reads up to {VERSION}; "
            "update Twinview"
        )


def _parse_sections(path: Path, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    try:
        sections = {section: json.loads(metadata[section]) for section in SECTIONS}
    except (KeyError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(_damaged(path, error)) from error
    if not all(isinstance(section, dict) for section in sections.values()):
        raise DamagedCheckpoint(_damaged(path, TypeError("a section is no dictionary")))
    return sections


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path} is not a checkpoint, or was cut off or damaged ({reason}); resume from another one"


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        flush_folder(path.parent)


def _remove(path: Path) -> None:
    """Where that fails as well, what it fails for has been said by then; the next save tries again."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
