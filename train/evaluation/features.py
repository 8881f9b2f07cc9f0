"""Representations of the labelled sets of an evaluation, for every protocol on frozen features.

Legend: n samples, D width of the representation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from train.evaluation.checks import check_splits
from train.evaluation.extractor import Extractor, ExtractorConfig
from train.evaluation.labelled_data import Split, open_labelled
from train.evaluation.protocol import EvaluationConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Representations and labels of a set.

    Attributes:
        values: float32 [n, D], on the CPU; from the cache a private map of its file, larger than memory perhaps.
        labels: int64 [n], on the CPU, from 0 to `num_classes` − 1.
        classes: names by label, where they are known.
        num_classes: of both splits.
    """

    values: Tensor
    labels: Tensor
    classes: list[str] | None = None
    num_classes: int = 0


class FeatureSource:
    """A checkpoint and the two sets that it is evaluated on, opened and checked; nothing is computed yet.

    Attributes:
        path: the checkpoint's file.
        pretraining: the configuration that it was trained with.
        network: encoder and head.
        train, test: the sets.
        classes: names by label, where they are known.
        num_classes: of both sets.

    Raises:
        ValueError: the checkpoint or a set cannot be used, or the sets do not fit each other.
        OSError: likewise.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self._config = config
        self.train, self.test = open_labelled(config.train_data, "train"), open_labelled(config.test_data, "test")
        self.classes, self.num_classes = check_splits(self.train, self.test)
        shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(ExtractorConfig)}
        self._extractor = Extractor(ExtractorConfig(**shared))
        self.path, self.network = self._extractor.path, self._extractor.network
        self.pretraining = self._extractor.pretraining

    def features(self, split: Split) -> Features:
        """The representation that the configuration asks for, of one set."""
        return self.representations(split, (self._config.head_layers,))[self._config.head_layers]

    def representations(self, split: Split, layers: Sequence[int]) -> dict[int, Features]:
        """Representations of one set after so many layers of the projection head each, from one pass at most.

        Args:
            split: which set.
            layers: as `EvaluationConfig.head_layers`; each once.

        Raises:
            ValueError: the head has not as many layers, or a representation is not finite.
            OSError: the cache cannot be written.
        """
        data = self.train if split == "train" else self.test
        found = self._extractor.representations(data, layers)
        return {
            layer: Features(values=values, labels=labels, classes=self.classes, num_classes=self.num_classes)
            for layer, (values, labels) in found.items()
        }


def features_of(config: EvaluationConfig, split: Split) -> Features:
    """The representation of one set that a configuration asks for; see `FeatureSource`."""
    return FeatureSource(config).features(split)


def representations_of(config: EvaluationConfig, split: Split, layers: Sequence[int] = (0, -1)) -> dict[int, Features]:
    """Several representations of one set from one pass, by their entry of `layers`; see `FeatureSource`."""
    return FeatureSource(config).representations(split, layers)
