"""Which labels a protocol on frozen features is given: all of them, and some of every class, over several subsets.

Subsets depend on the labels and the seed alone: all representations and protocols see the same ones, and the 1 of a
seed is among its 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pipelines.subset import balanced_subset
from train.evaluation.protocol import EvaluationConfig

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(EvaluationConfig):
    """How many labels are used."""

    labels_per_class: tuple[int, ...] = ()
    """Labels of each class that are used, beside all of them: for instance [1, 5, 20]."""
    num_seeds: int = 5
    """Random subsets of each such size, of the seeds from `seed` on; means and deviations are over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_seeds < 1:
            raise ValueError(f"`num_seeds` must be at least 1, got {self.num_seeds}")
        counts = self.labels_per_class
        if any(count < 1 for count in counts) or len(set(counts)) < len(counts):
            raise ValueError(f"`labels_per_class` must be at least 1 each, and each once, got {list(counts)}")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The samples whose labels are used."""

    amount: str
    """Labels a class, or `all`."""
    seed: int
    """Of the subset."""
    rows: Tensor | None
    """int64, rising; None: all."""


def label_subsets(labels: Tensor, config: FewShotConfig) -> Iterator[Labelled]:
    """Every subset for every number of labels, and all labels, once.

    Raises:
        ValueError: a class has too few samples.
    """
    for count in config.labels_per_class:
        for seed in range(config.seed, config.seed + config.num_seeds):
            yield Labelled(amount=str(count), seed=seed, rows=balanced_subset(labels, count, seed))
    yield Labelled(amount=ALL, seed=config.seed, rows=None)
