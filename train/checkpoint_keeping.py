"""Which checkpoints of a run stay: the last ones, the best, and those of every so many epochs.

What stays is a function of what the files say of themselves, so a run that is resumed keeps what it would have kept.
Files that cannot be read, and those of steps beyond the newest, are nobody's to delete.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.checkpoint import Checkpoint, DamagedCheckpoint, list_checkpoints, load_checkpoint, read_sections

logger = logging.getLogger(__name__)

KeepBest = Literal["none", "loss", "probe_accuracy", "knn_accuracy"]


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """What stays of a run's checkpoints."""

    last: int = 2
    """How many of the latest."""
    best: KeepBest = "none"
    """Also that of the lowest loss, or of the highest accuracy."""
    every_epochs: int = 0
    """Also those at the end of every so many epochs; 0: none."""

    def __post_init__(self) -> None:
        for name, low in (("last", 1), ("every_epochs", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done."""
    epoch: int = 0
    """From 0."""
    epoch_ended: bool = False
    """Whether it was taken at the end of that epoch."""
    scores: dict[str, float] = field(default_factory=dict)
    """By metric; those that are not finite count as none."""


def saved_at(position: dict[str, Any]) -> Saved:
    """What the `position` of a checkpoint says; those of version 1 of the format held less."""
    return Saved(
        step=position["step"],
        epoch=position.get("epoch", 0),
        epoch_ended=position.get("epoch_ended", False),
        scores=position.get("scores", {}),
    )


def steps_to_keep(saved: Sequence[Saved], keep: KeepConfig) -> set[int]:
    """The steps of the checkpoints that stay; the newest one always does."""
    by_step = sorted(saved, key=lambda one: one.step)
    kept = {one.step for one in by_step[-keep.last :]}
    best = best_of(by_step, keep.best)
    if best is not None:
        kept.add(best.step)
    if keep.every_epochs:
        kept |= {one.step for one in by_step if one.epoch_ended and (one.epoch + 1) % keep.every_epochs == 0}
    return kept


def best_of(saved: Sequence[Saved], metric: KeepBest) -> Saved | None:
    """The one of the lowest loss, or of the highest accuracy; the first of equals; None where none has a score."""
    scored = [one for one in saved if math.isfinite(one.scores.get(metric, math.nan))]
    sign = 1.0 if metric == "loss" else -1.0
    return min(scored, key=lambda one: sign * one.scores[metric], default=None)


def prune_checkpoints(run_dir: Path, keep: KeepConfig, *, newest: int) -> None:
    """Delete the checkpoints of a run that need not stay, once that of step `newest` is written.

    Raises:
        OSError: one could not be deleted.
    """
    found = {one.step: (path, one) for path, one in _readable(run_dir) if one.step <= newest}
    if newest not in found:
        return
    kept = steps_to_keep([one for _, one in found.values()], keep)
    for step in found.keys() - kept:
        found[step][0].unlink()


def best_checkpoint(run_dir: Path, metric: KeepBest | None = None) -> Path | None:
    """The checkpoint of a run with the best score, of those that are there; None where none has one.

    Args:
        run_dir: of the run.
        metric: that is compared; default: the run's own `train.keep_best`, and where that is none, the loss.
    """
    readable = _readable(run_dir)
    if not readable:
        return None
    if metric is None:
        metric = read_sections(readable[-1][0])["config"].get("train", {}).get("keep_best", "none")
    best = best_of([one for _, one in readable], "loss" if metric == "none" else metric)
    return next((path for path, one in readable if one is best), None)


def newest_whole_checkpoint(run_dir: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that is not damaged, and what it holds; None where there is no checkpoint at all.

    A damaged one is passed over with a warning; it is written again when the run comes by.

    Raises:
        ValueError: all of them are damaged, or one cannot be read, is something else, or has a newer format.
    """
    damaged = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            logger.warning("%s is passed over: %s", path.name, error)
            damaged.append(path.name)
    if damaged:
        raise ValueError(
            f"all checkpoints in {run_dir / 'checkpoints'} are damaged ({', '.join(damaged)}); put back a whole one, "
            f"or remove {run_dir} to start over"
        )
    return None


def _readable(run_dir: Path) -> list[tuple[Path, Saved]]:
    """Files of a run, and what their beginnings say; damaged and foreign ones are left out."""
    found = []
    for path in list_checkpoints(run_dir):
        try:
            found.append((path, saved_at(read_sections(path)["position"])))
        except ValueError:
            logger.debug("%s is no readable checkpoint", path)
    return found
