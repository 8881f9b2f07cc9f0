"""Other programs' checkpoint files: their tensors by name, without running any code of theirs; and where encoders lie.

A file is safetensors, or a pickle of torch.save read with `weights_only=True`, which makes tensors and plain containers
and refuses everything else. Tensors are named by their path through the nested dictionaries
(`state_dict.module.encoder_q.conv1.weight`), so that no container's structure need be known.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save's archives, and what it wrote before version 1.6
MAX_DEPTH = 32  # of containers in one another; Lightning's checkpoints have a handful
MOMENTUM_TWINS = re.compile(r"momentum|teacher|target|ema|encoder_k|key", re.IGNORECASE)
STEMS = {  # the end of the first convolution's name → what must lie beside it
    "conv1.weight": ("bn1.running_mean", "layer4.0.conv1.weight"),
    "0.weight": ("1.running_mean", "5.0.conv1.weight"),  # children of a network, in a Sequential
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU.

    Raises:
        ValueError: there is no such file, it is damaged, or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        is_pickle = file.read(4).startswith(PICKLES)
    if not is_pickle:
        try:
            return dict(load_safetensors(path.read_bytes()))
        except SafetensorError as error:
            raise ValueError(f"{path} is neither a checkpoint of torch.save nor safetensors, or is damaged") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is unusual in it; one line is to tell what was found
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser of a file that anyone may have made raises whatever its bytes lead to
        if match := re.search(r"GLOBAL ([\w.]+)|class (\S+) ", str(error)):
            raise ValueError(
                f"{path} holds pickled code, `{match[1] or match[2]}`, and was not loaded; save its state_dict alone, "
                "where you trust it, and import that"
            ) from error
        raise ValueError(f"{path} is not a checkpoint of torch.save, or is damaged; nothing was loaded") from error
    return dict(_flatten(content, path))


def _flatten(content: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """In the file's order. A container that stands in several places, or in itself, is read in the first alone."""
    seen: set[int] = set()
    waiting: list[tuple[str, int, Any]] = [("", 0, content)]
    while waiting:
        name, depth, item = waiting.pop()
        if isinstance(item, Tensor):
            yield name.removesuffix("."), item
        elif isinstance(item, Mapping) and id(item) not in seen:
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"{path} holds containers more than {MAX_DEPTH} deep in one another; save the state_dict alone"
                )
            seen.add(id(item))
            inside = [(f"{name}{key}.", depth + 1, value) for key, value in item.items() if isinstance(key, str)]
            waiting.extend(reversed(inside))


def choose_prefix(names: Mapping[str, Tensor], wanted: str | None, path: Path) -> str:
    """What stands before the names of the encoder's tensors.

    Of an encoder and its momentum twin the encoder is taken, unless the other is asked for.

    Args:
        names: all tensors of the file.
        wanted: the end of the prefix, with or without its last dot; None: to be found.
        path: of the file, for messages.

    Raises:
        ValueError: no ResNet is found, or several; names them.
    """
    found = _prefixes(names)
    if not found:
        some = ", ".join(f"`{name}`" for name in list(names)[:3])
        raise ValueError(f"{path} holds no ResNet as torchvision names it; its tensors are {some or 'none'} …")
    if wanted is not None:
        end = wanted if wanted.endswith(".") or not wanted else f"{wanted}."
        fits = [prefix for prefix in found if prefix == end or (end and prefix.endswith(f".{end}"))]
    else:
        fits = found if len(found) == 1 else [prefix for prefix in found if not MOMENTUM_TWINS.search(prefix)]
    if len(fits) != 1:
        listed = ", ".join(f"`{prefix}`" for prefix in found)
        asked = f", none or several of which end in `{wanted}`" if wanted is not None else ""
        raise ValueError(f"{path} holds encoders under {listed}{asked}; choose one with `--prefix`")
    return fits[0]


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    return [
        name.removesuffix(first)
        for name in names
        for first, others in STEMS.items()
        if (name == first or name.endswith(f".{first}"))
        and names[name].ndim == 4
        and all(name.removesuffix(first) + other in names for other in others)
    ]
