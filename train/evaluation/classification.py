"""How well scores classify: top-1, top-5, per class, the mean over classes, and how sure each figure is.

Intervals hold 95 %. Of one test set: Wilson's score interval of a share (Wilson 1927). Over seeds: Student's t of
their mean.

Legend: N test samples, C classes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.special import stdtrit
from torch import Tensor

LEVEL = 0.95
TOP = 5
CHUNK_NUMBERS = 2**24  # of scores that are compared at a time: 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class ClassFigure:
    """One class of a test set."""

    accuracy: float | None
    """Share of its samples that are classified rightly, in [0, 1]; None where it has none."""
    count: int
    """Its samples."""


@dataclass(frozen=True, kw_only=True)
class ClassificationMetrics:
    """One classifier on one test set; shares are in [0, 1]."""

    num_samples: int
    top1: float
    """Samples whose highest score is that of their class."""
    top5: float
    """Samples whose class is among the min(5, C) highest scores."""
    mean_per_class: float
    """Mean of the accuracies of the classes that the test set has: each class counts alike."""
    per_class: dict[str, ClassFigure]
    """C of them, by the class's name, or its number where names are unknown."""

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """Of `top1`, for the size of this test set: `wilson_interval`."""
        return wilson_interval(round(self.top1 * self.num_samples), self.num_samples)


@dataclass(frozen=True, kw_only=True)
class SeedFigure:
    """One figure over several seeds."""

    mean: float
    std: float
    """Sample standard deviation; 0 of a single seed."""
    confidence_interval: tuple[float, float] | None
    """Of the mean, Student's t; None of a single seed."""


def measure(
    scores: Tensor, labels: Tensor, num_classes: int, classes: Sequence[str] | None = None
) -> ClassificationMetrics:
    """Compare scores with labels. Of equal scores the lowest class stands first, on every device.

    Args:
        scores: [N, C], floating; the higher, the likelier.
        labels: [N], integers from 0 to C − 1.
        num_classes: C.
        classes: names by label.

    Raises:
        ValueError: there are no samples, shapes do not fit, a label is outside of the classes, or a score is NaN.
    """
    _check(scores, labels, num_classes, classes)
    ranks = _ranks(scores, labels.to(scores.device)).cpu()
    labels = labels.cpu()
    right = torch.bincount(labels[ranks == 0], minlength=num_classes).tolist()
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    names = classes or [str(label) for label in range(num_classes)]
    per_class = {
        name: ClassFigure(accuracy=hits / count if count else None, count=count)
        for name, hits, count in zip(names, right, counts, strict=True)
    }
    return ClassificationMetrics(
        num_samples=len(labels),
        top1=sum(right) / len(labels),
        top5=int((ranks < TOP).sum()) / len(labels),
        mean_per_class=statistics.fmean(f.accuracy for f in per_class.values() if f.accuracy is not None),
        per_class=per_class,
    )


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Between which shares the true one lies, given `hits` of `count` ≥ 1 independent samples; within [0, 1]."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, scale = hits / count, 1 / (1 + z * z / count)
    centre = (share + z * z / (2 * count)) * scale
    half = z * scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def over_seeds(values: Sequence[float]) -> SeedFigure:
    """Mean, sample standard deviation and interval of the mean of a figure that was measured with one or more seeds."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return SeedFigure(mean=mean, std=0.0, confidence_interval=None)
    std = statistics.stdev(values)
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * std / math.sqrt(len(values))
    return SeedFigure(mean=mean, std=std, confidence_interval=(mean - half, mean + half))


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one, int64 [N]: of a higher score, or of the same and a lower label."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    ranks = []
    chunk = max(1, CHUNK_NUMBERS // scores.shape[1])
    for rows, right in zip(torch.split(scores, chunk), torch.split(labels, chunk), strict=True):
        reached = rows.gather(1, right[:, None])
        before = (rows > reached) | ((rows == reached) & (columns < right[:, None]))
        ranks.append(before.sum(dim=1))
    return torch.cat(ranks)


def _check(scores: Tensor, labels: Tensor, num_classes: int, classes: Sequence[str] | None) -> None:
    if scores.ndim != 2 or scores.shape[1] != num_classes or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"scores must be [N, {num_classes}] with one label each and N ≥ 1, got {list(scores.shape)} with labels "
            f"{list(labels.shape)}"
        )
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"there must be a name for each of {num_classes} classes, got {len(classes)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {low if low < 0 else high}")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores must not be NaN, got {int(scores.isnan().any(dim=1).sum())} samples with some")
