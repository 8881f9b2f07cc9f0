"""Which images the nearest neighbours of a run are measured on, and which of them a rank represents.

Both are functions of the files and the configuration alone. Images are represented in chunks of a fixed size, and a
chunk is the same whichever rank takes it: so the figure is the same on any number of ranks.

Legend: n chosen samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import Beton, open_beton
from pipelines.build import DataConfig, open_data, whole_of
from pipelines.rng import bits, key_of
from pipelines.subset import SubsetConfig
from train.evaluation.checks import check_same_classes
from train.online.config import OnlineConfig

_CHOICE = 0x6B6E6E  # "knn": keeps these keys apart from those of the order and the views


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """The chosen samples of a file."""

    beton: Beton
    """These alone, in the order of the file."""
    labels: NDArray[np.int64]
    """int64 [n]."""

    def rows_of_rank(self, rank: int, world_size: int, chunk: int) -> NDArray[np.int64]:
        """Which of the samples a rank represents, int64, rising: every `world_size`-th chunk."""
        rows = np.arange(len(self.labels))
        own: NDArray[np.int64] = rows[rows // chunk % world_size == rank]
        return own


@dataclass(frozen=True, kw_only=True)
class NeighbourSets:
    """Where neighbours are taken from, and what they classify."""

    train: LabelledSet
    test: LabelledSet


def open_neighbour_sets(config: OnlineConfig, data: DataConfig) -> NeighbourSets | None:
    """Open both files; None where the run measures no neighbours.

    Raises:
        ValueError: a file is missing or damaged, has no labels, or other classes than the other; too few samples.
    """
    if not config.knn_every_epochs:
        return None
    assert config.test_data is not None, "OnlineConfig refuses that"
    if config.train_data is None and data.loader == "folder":
        raise ValueError(
            f"`online.train_data` must name a labelled .beton where `data.loader` is folder, got null for {data.path}; "
            "make one with `python -m tools.convert`"
        )
    train_path = config.train_data or data.path
    check_same_classes(train_path, config.test_data)
    shown = None  # rows of the set that is trained on, where it hides labels of others
    if config.train_data is None and not data.labelled.is_whole:
        opened = whole_of(open_data(dataclasses.replace(data, subset=SubsetConfig())))
        assert opened.labels is not None
        shown = np.flatnonzero(opened.labels >= 0)
    train = open_labelled(train_path, "train_data", config.knn_train_samples, shown)
    test = open_labelled(config.test_data, "test_data", config.knn_test_samples)
    if len(train.labels) < config.knn_neighbours:
        raise ValueError(
            f"`online.knn_neighbours` must not exceed the {len(train.labels)} samples of {train_path}, got "
            f"{config.knn_neighbours}; take fewer neighbours"
        )
    return NeighbourSets(train=train, test=test)


def open_labelled(path: str | Path, field: str, limit: int, shown: NDArray[np.int64] | None = None) -> LabelledSet:
    """At most `limit` samples of a file, balanced by class; 0: all. With `shown`, int64 rows, of those alone.

    Raises:
        ValueError: the file is missing, damaged, or a sample has no label.
    """
    beton = open_beton(path)
    if beton.labels is None or int(beton.labels.min()) < 0:
        raise ValueError(
            f"`online.{field}` must have a label for every image, {path} has {'none' if beton.labels is None else '−1'}"
            "; convert a folder with one folder for each class"
        )
    labelled = LabelledSet(beton=beton, labels=beton.labels)
    labelled = labelled if shown is None else take_rows(labelled, shown)
    return take_rows(labelled, balanced_rows(labelled.labels, limit))


def take_rows(labelled: LabelledSet, rows: NDArray[np.int64]) -> LabelledSet:
    """Some samples of a set, int64 [n], in their order; the set itself where they are all."""
    if len(rows) == len(labelled.labels):
        return labelled
    beton, labels = labelled.beton, labelled.labels[rows]
    tables = {name: getattr(beton, name)[rows] for name in ("modes", "widths", "heights", "offsets", "sizes")}
    chosen = dataclasses.replace(beton, num_samples=len(rows), labels=labels, **tables)
    return LabelledSet(beton=chosen, labels=labels)


def balanced_rows(labels: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most `limit` rows, as many of each class as it has and the limit allows; 0: all. Always the same ones.

    Every row gets a random number. Each class offers its rows in that order, the classes take turns.

    Args:
        labels: integers [N].
        limit: of rows.

    Returns:
        int64, rising.
    """
    rows = np.arange(len(labels))
    if not 0 < limit < len(labels):
        return rows
    keys = bits(key_of(_CHOICE), rows.astype(np.uint64))
    by_class = np.lexsort((keys, labels))
    firsts = np.searchsorted(labels[by_class], labels[by_class])  # where each row's class begins
    turns = np.empty_like(rows)
    turns[by_class] = rows - firsts
    return np.sort(np.lexsort((keys, turns))[:limit])
