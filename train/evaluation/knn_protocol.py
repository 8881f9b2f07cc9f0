"""`evaluate.py knn`: weighted k nearest neighbours of frozen representations, for several k and τ at once.

Neighbours are looked up once, for the largest k. Which setting counts is given in advance: the first k with the first
τ. The others are reported beside it; none is chosen by its accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from train.evaluation.classification import ClassificationMetrics, measure, over_seeds
from train.evaluation.features import Features, FeatureSource
from train.evaluation.few_shot_subsets import FewShotConfig, label_subsets
from train.evaluation.knn import nearest, votes
from train.evaluation.protocol import check_single_process
from train.evaluation.results import Result
from train.runtime import choose_device, read_ranks

__all__ = ["KNNConfig", "run_knn"]

NEIGHBOURS = (20, 200)  # DINO reports 20, Wu et al. 200

Setting = tuple[int, float]
"""k and τ."""


@dataclass(frozen=True, kw_only=True)
class KNNConfig(FewShotConfig):
    """Which neighbours vote, and how."""

    k: tuple[int, ...] | None = None
    """Neighbours that vote; with few labels, all labelled samples where there are fewer. The first is the headline.
    null: 20 and 200, or all training samples where there are fewer."""
    temperature: tuple[float, ...] = (0.07, 0.1)
    """τ: a neighbour of similarity s votes with weight exp(s / τ). The first is the headline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and (not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k)):
            raise ValueError(f"`k` must be one or more numbers from 1 on, each once, got {list(self.k)}; usual: [20]")
        found = self.temperature
        if not found or not all(0.0 < value < float("inf") for value in found) or len(set(found)) < len(found):
            raise ValueError(
                f"`temperature` must be one or more finite numbers above 0, each once, got {list(found)}; usual: [0.07]"
            )

    def settings(self, num_train: int) -> list[Setting]:
        """All of them, the headline first.

        Args:
            num_train: training samples.

        Raises:
            ValueError: these are fewer than neighbours are asked for.
        """
        if self.k is not None and max(self.k) > num_train:
            raise ValueError(
                f"`k` must not exceed the {num_train} samples of {self.train_data}, got {max(self.k)}; take fewer "
                "neighbours"
            )
        return list(product(self.k or sorted({min(k, num_train) for k in NEIGHBOURS}), self.temperature))


def run_knn(config: KNNConfig) -> Result:
    """Classify the test set by its neighbours in the training set, or in subsets of it.

    Raises:
        ValueError: a file is missing or damaged, classes do not fit, a class has too few samples, or there are fewer
            training samples than neighbours are asked for.
        OSError: likewise.
    """
    check_single_process("`evaluate.py knn`")
    source = FeatureSource(config)
    settings = config.settings(len(source.train.labels))
    subsets = list(label_subsets(torch.tensor(source.train.labels), config))
    train, test = source.features("train"), source.features("test")
    device = choose_device(config.device, read_ranks())
    figures: dict[Setting, dict[str, list[ClassificationMetrics]]] = {setting: {} for setting in settings}
    for subset in subsets:
        for setting, measured in _measure(train, test, subset.rows, settings, device):
            figures[setting].setdefault(subset.amount, []).append(measured)
    headline = settings[0]
    return Result(
        protocol="knn",
        figures=figures[headline],
        seeds={amount: [one.seed for one in subsets if one.amount == amount] for amount in figures[headline]},
        chosen={"k": headline[0], "temperature": headline[1]},
        chosen_by="given in advance: the first of `k` and of `temperature`",
        details={"settings": [_words(setting, figures[setting]) for setting in settings]},
    )


def _measure(
    train: Features, test: Features, rows: Tensor | None, settings: Sequence[Setting], device: torch.device
) -> Iterator[tuple[Setting, ClassificationMetrics]]:
    """Every setting, with the training samples of these rows."""
    x, y = (train.values, train.labels) if rows is None else (train.values[rows], train.labels[rows])
    similarity, neighbours = nearest(x, test.values, min(max(k for k, _ in settings), len(x)), device=device)
    labels = y[neighbours]
    for k, temperature in settings:
        scores = votes(similarity[:, :k], labels[:, :k], temperature=temperature, num_classes=test.num_classes)
        yield (k, temperature), measure(scores, test.labels, test.num_classes, test.classes)


def _words(setting: Setting, figures: Mapping[str, list[ClassificationMetrics]]) -> dict[str, Any]:
    """What a setting reached, by the amount of labels: means over the subsets."""
    means = {
        amount: {
            name: over_seeds([float(getattr(one, name)) for one in measured]).mean
            for name in ("top1", "top5", "mean_per_class")
        }
        for amount, measured in figures.items()
    }
    return {"k": setting[0], "temperature": setting[1], "figures": means}
