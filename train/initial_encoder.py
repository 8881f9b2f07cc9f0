"""The encoder of a checkpoint: which file is meant, which of its weights, and loading them strictly.

A checkpoint of a run holds the whole method, one that `tools.import_checkpoint` wrote the encoder alone; both name its
tensors `encoder.…`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from model.methods.base import Method
from pipelines.manifest import file_sha256
from train.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from train.checkpoint_keeping import best_checkpoint

logger = logging.getLogger(__name__)

ENCODER = "encoder."
Which = Literal["latest", "best"]
Weights = Literal["live", "average"]


def find_checkpoint(path: Path, which: Which = "latest") -> Path:
    """The checkpoint file that a user means: itself, or the latest or best of a run directory.

    Best is by the run's `train.keep_best`; where that is none, by the loss, of the checkpoints that are there.

    Raises:
        ValueError: the directory holds none such, or `which` is asked of a file.
    """
    if not path.is_dir():
        if which != "latest":
            raise ValueError(f"`--which {which}` needs a run directory to choose in, got {path}")
        return path
    latest = latest_checkpoint(path)
    if latest is None:
        raise ValueError(f"there is no checkpoint in {path}/checkpoints; train first, or give a checkpoint file")
    if which == "latest":
        return latest
    best = best_checkpoint(path)
    if best is None:
        raise ValueError(f"no checkpoint of {path} has the score that `train.keep_best` compares; take the latest")
    return best


def results_dir(checkpoint: Path) -> Path:
    """Where that which is made of a checkpoint is put: its run's directory; for a file by itself, one of its name."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder / checkpoint.stem


def encoder_weights(checkpoint: Checkpoint, weights: Weights, source: Path) -> dict[str, Tensor]:
    """The encoder's tensors by their names in `ResNet.state_dict()`.

    Args:
        checkpoint: of a run, or imported.
        weights: those that the last step left, or their moving average.
        source: the checkpoint's file, for messages.

    Raises:
        ValueError: the checkpoint holds no average, or no encoder.
    """
    state = checkpoint.model if weights == "live" else checkpoint.average
    if weights == "average" and not state:
        raise ValueError(f"{source} holds no average of the weights; train with `train.ema_decay`, or take live ones")
    found = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    if not found:
        raise ValueError(f"{source} holds no encoder: no tensor is named `{ENCODER}…`")
    return found


def check_fits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path, remedy: str) -> None:
    """Refuse tensors that are not, name by name and shape by shape, those of a network.

    Raises:
        ValueError: names the first tensor that is missing, unexpected or of another shape.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{source} lacks `{name}` {list(tensor.shape)}; {remedy}")
        if found[name].shape != tensor.shape:
            shape = list(found[name].shape)
            raise ValueError(f"`{name}` must have shape {list(tensor.shape)}, got {shape} in {source}; {remedy}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{source} holds `{name}` {list(found[name].shape)}, which has no place; {remedy}")


def check_digest(path: Path, sha256: str | None, field: str) -> None:
    """Refuse a file that is not the one that is meant.

    Args:
        path: of the file.
        sha256: its digest; None: that of any.
        field: of the configuration that names the file, for the message.

    Raises:
        ValueError: the digest is another one.
    """
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = file_sha256(file)
    if found != sha256:
        raise ValueError(f"`{field}` must be a file of sha256 {sha256}, {path} has {found}; give the one that is meant")


def load_initial_encoder(path: str | Path, method: Method, sha256: str | None = None) -> None:
    """Start a method from the encoder of a checkpoint (the live weights), as `train.initial_encoder` asks.

    So do the other parts that `method.pretrained` names: the layers of the projection head that a classifier keeps.
    What is left keeps its random weights. `path` is a file, or a run directory, whose latest one is taken; with
    `sha256`, its digest must be that.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or its encoder or head is another one than this
            method's; nothing is changed then.
    """
    source = find_checkpoint(Path(path))
    check_digest(source, sha256, "train.initial_encoder")
    checkpoint = load_checkpoint(source)
    found = encoder_weights(checkpoint, "live", source)
    theirs = checkpoint.config.get("model", {}).get("encoder", {})
    words = ", ".join(f"{name}: {value}" for name, value in theirs.items())
    check_fits(found, method.encoder.state_dict(), source, f"set `model.encoder` as there ({words})")
    parts = tuple(part for part in method.pretrained if part != ENCODER)
    ours = {name: tensor for name, tensor in method.state_dict().items() if name.startswith(parts)}
    kept = {name: tensor for name, tensor in checkpoint.model.items() if name in ours}
    check_fits(kept, ours, source, "keep fewer layers of the head, or set `model.projection_head` as there")
    method.encoder.load_state_dict(found)
    method.load_state_dict(kept, strict=False)
    method.weights_replaced()
    augment = checkpoint.config.get("augment", {})
    logger.info(
        "starting from the encoder of %s, trained on views normalised by mean %s and std %s",
        source,
        augment.get("mean"),
        augment.get("std"),
    )
