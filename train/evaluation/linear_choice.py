"""Which of several linear classifiers counts: the one that is best on rows of the training set that were held out."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.subset import SubsetConfig, choose_rows
from train.cli import RunFailed
from train.evaluation.classification import ClassificationMetrics, measure
from train.evaluation.linear_probe import Head, LinearHeads

CHUNK_ROWS = 4096  # of representations that are on the device at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A setting, and what became of it."""

    head: Head
    diverged: bool
    """With any seed."""
    validation_top1: float | None
    """Mean over the seeds; None where it has diverged, or nothing was held out."""


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Rows that do not train but choose: a share of every class, at least one row of each. A function of the seed.

    Args:
        labels: int64 [n], from 0.
        fraction: of each class.
        seed: which rows.

    Returns:
        bool [n].

    Raises:
        ValueError: nothing of a class would be left to train on.
    """
    values = labels.numpy()
    rows = choose_rows(SubsetConfig(fraction=fraction, seed=seed), values, None, len(values))
    held_out = np.zeros(len(values), bool)
    held_out[rows] = True
    left = np.bincount(values[~held_out], minlength=int(values.max()) + 1)
    empty = np.setdiff1d(values, np.flatnonzero(left))
    if len(empty):
        raise ValueError(
            f"`val_fraction` {fraction:g} leaves nothing to train on of class {empty[0]}, which has "
            f"{int((values == empty[0]).sum())} samples in `train_data`; lower it, or give one of `base_lrs` and "
            "one of `weight_decays`, which takes no validation"
        )
    return torch.from_numpy(held_out)


def try_settings(
    settings: Sequence[Head], trained: Sequence[LinearHeads], validation: tuple[Tensor, Tensor] | None, num_classes: int
) -> list[Tried]:
    """Measure every setting.

    Args:
        settings: H of them.
        trained: with each seed; either H heads, or 2H: those that chose, and then those on all rows.
        validation: representations [m, D] and labels [m] that were held out; None: nothing was.
        num_classes: of the labels.
    """
    tried = []
    for i, head in enumerate(settings):
        diverged = any(any(heads.diverged()[i :: len(settings)]) for heads in trained)
        top1 = None
        if validation is not None and not diverged:
            top1 = statistics.fmean(measure_head(heads, i, *validation, num_classes).top1 for heads in trained)
        tried.append(Tried(head=head, diverged=diverged, validation_top1=top1))
    return tried


def choose(tried: Sequence[Tried]) -> int:
    """The position of the best setting by validation, the first of equally good ones; what diverged does not count.

    Raises:
        RunFailed: all of them have diverged.
    """
    rates = [one.head.base_lr for one in tried]
    sound = [i for i, one in enumerate(tried) if not one.diverged]
    if not sound:
        raise RunFailed(
            f"all {len(tried)} linear classifiers have diverged, at base learning rates from {min(rates):g} to "
            f"{max(rates):g}; set `base_lrs` lower"
        )
    for one in tried:
        if one.diverged:
            logger.warning(
                "the linear classifier of base learning rate %g and weight decay %g has diverged, and is not chosen",
                one.head.base_lr,
                one.head.weight_decay,
            )
    best = max(sound, key=lambda i: tried[i].validation_top1 or 0.0)
    if min(rates) < max(rates) and rates[best] in (min(rates), max(rates)):
        logger.warning("the best base learning rate, %g, is at the edge of `base_lrs`: widen it", rates[best])
    return best


def measure_head(
    heads: LinearHeads, i: int, x: Tensor, labels: Tensor, num_classes: int, classes: Sequence[str] | None = None
) -> ClassificationMetrics:
    """One head on representations [m, D], which may be a map of a file."""
    device = heads.weight.device
    scores = torch.cat([heads.scores(rows.to(device), i).cpu() for rows in torch.split(x, CHUNK_ROWS)])
    return measure(scores, labels, num_classes, classes)
