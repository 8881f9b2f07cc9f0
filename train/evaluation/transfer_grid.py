"""A grid of trainings, from which a validation split chooses: cell by cell, so that an interruption costs none of them.

Each cell is a run of its own. Its figures are kept in a file in its directory, beside which its weights are removed:
the same command reads them there, and goes on with the first cell that has none.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.subset import SubsetConfig
from train.cli import RunFailed
from train.config import PretrainConfig, check_run_dir
from train.evaluation.labelled_run import Source, chosen_rows
from train.evaluation.network_accuracy import network_accuracy
from train.interruption import Interruption
from train.run import train
from train.runtime import read_ranks

VALIDATION_FILE = "validation.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point of the grid."""

    learning_rate: float
    weight_decay: float
    """Before it is divided by the rate."""

    @property
    def name(self) -> str:
        """Of its run."""
        return f"lr{self.learning_rate:g}-wd{self.weight_decay:g}"


def split_of(source: Source, validation_fraction: float, seed: int) -> tuple[SubsetConfig, NDArray[np.int64]]:
    """The part of the training set that settings are trained on, and the rows that they are chosen on, int64, rising.

    Args:
        source: whose training set.
        validation_fraction: share of each class that is held out.
        seed: which.

    Raises:
        ValueError: a class has a single sample, or none is left to choose on.
    """
    labels = source.train.labels
    counts = np.bincount(labels, minlength=source.num_classes)
    if counts.min() < 2:
        label = int(counts.argmin())
        name = f"{label} ({source.classes[label]})" if source.classes else str(label)
        raise ValueError(
            f"`train_data` must hold at least 2 samples of each class, to train and to choose settings on, "
            f"{source.train.path} has {counts[label]} of class {name}"
        )
    subset = SubsetConfig(fraction=1.0 - validation_fraction, seed=seed)
    rows = chosen_rows(source, subset)
    held_out = np.setdiff1d(np.arange(len(labels)), rows)
    if len(held_out) == 0:
        raise ValueError(
            f"`validation_fraction` must hold out at least one of {len(labels)} samples, got "
            f"{validation_fraction}; take more"
        )
    return subset, held_out


def validate(
    run: PretrainConfig,
    source: Source,
    held_out: NDArray[np.int64],
    interruption: Interruption,
    *,
    batch_size: int,
) -> dict[str, Any]:
    """Train a setting and measure it on the rows held out; what was found is kept, and found there the next time.

    All ranks must call. The weights go: nobody needs them again.

    Returns:
        `top1` and `mean_per_class`; None for a training that diverged.

    Raises:
        ValueError: the run's directory holds another run, or figures of other images.
        RunStopped: the run did not come to its end, for another reason than the setting.
    """
    path = run.run_dir / VALIDATION_FILE
    identity = {"num_held_out": len(held_out), "train_data": source.train.identity}
    if path.exists():
        check_run_dir(run)
        return _read(path, identity)
    found: dict[str, Any]
    try:
        train(run, interruption)
    except RunFailed as error:
        if not error.alike:  # of this rank alone: not what the setting is to blame for
            raise
        logger.warning("%s: %s", run.name, error)
        found = {"top1": None, "mean_per_class": None, "failed": str(error)}
    else:
        metrics = network_accuracy(
            run.run_dir, source.train, num_classes=source.num_classes, batch_size=batch_size, rows=held_out
        )
        found = {"top1": metrics.top1, "mean_per_class": metrics.mean_per_class}
    if read_ranks().rank == 0:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        partial.write_text(json.dumps({"identity": identity, "found": found}, indent=2) + "\n")
        partial.replace(path)
        shutil.rmtree(run.run_dir / "checkpoints", ignore_errors=True)
    return found


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What was found for a setting.

    Raises:
        ValueError: it is damaged, or of other images.
    """
    remedy = f"remove {path.parent} to train it again"
    try:
        content = json.loads(path.read_text())
        found = {name: content["found"][name] for name in ("top1", "mean_per_class")}
        theirs = content["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; {remedy}") from error
    if theirs != identity:
        raise ValueError(f"{path} was measured on other images than those of `train_data`; {remedy}")
    return found


def best_of(settings: Sequence[Setting], tried: Sequence[dict[str, Any]], select_by: str) -> Setting:
    """The setting with the highest figure; of equal ones the first.

    Raises:
        RunFailed: every training diverged.
    """
    scores = [-math.inf if found[select_by] is None else found[select_by] for found in tried]
    if max(scores) == -math.inf:
        raise RunFailed("every setting of the grid diverged; try lower `learning_rates`")
    return settings[scores.index(max(scores))]
