"""What every protocol asks of labelled sets and features before it starts: one line names what is amiss.

Legend: N test samples, M training samples, n of either, C classes, D width of the features.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest
from train.evaluation.labelled_data import LabelledData

CHUNK_NUMBERS = 2**24  # of features that are looked at a time: 64 MiB of float32
NUM_NAMED = 3  # of the classes that a message is about


def check_splits(train: LabelledData, test: LabelledData) -> tuple[list[str] | None, int]:
    """Refuse two sets that cannot be learned from and measured on.

    Returns:
        The names of the classes, if they are known, and C.

    Raises:
        ValueError: a set has a single sample, or no sample of a class, or labels outside of the classes; or the
            classes of the two differ.
    """
    for data in (train, test):
        if len(data.labels) < 2:
            raise ValueError(f"{data.field} must hold at least 2 samples, {data.path} holds {len(data.labels)}")
    if train.classes is not None and test.classes is not None:
        check_classes(train.classes, test.classes, train.path, test.path)
    classes = train.classes or test.classes
    num_classes = len(classes) if classes else int(train.labels.max()) + 1
    for data in (train, test):
        _check_range(data, num_classes)
        _check_none_missing(data, classes, num_classes)
    return classes, num_classes


def check_labelled(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raise a ValueError naming the split unless features are finite [n, D] and labels integers [n] ≥ 0."""
    for split, features, labels in (("training", train_x, train_y), ("test", test_x, test_y)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise ValueError(
                f"{split} features must be [N, D] with one label each and N ≥ 1, "
                f"got {list(features.shape)} with labels {list(labels.shape)}"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise ValueError(f"{split} labels must be integers from 0, got {labels.dtype} from {labels.min()}")
        check_finite(features, split)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features must have one width, got {train_x.shape[1]} and {test_x.shape[1]}")


def check_finite(features: Tensor, split: str, *, first_row: int = 0) -> None:
    """Refuse features [n, D] with NaN or infinity.

    Args:
        features: of a whole split, or of its samples from `first_row` on.
        split: `training` or `test`, for the message.
        first_row: the sample that the first row is of.

    Raises:
        ValueError: as said; names the first sample.
    """
    chunk = max(1, CHUNK_NUMBERS // max(1, features.shape[1]))
    bad, first = 0, 0
    for start in range(0, len(features), chunk):
        wrong = ~features[start : start + chunk].isfinite().all(dim=1)
        if not bad and bool(wrong.any()):
            first = first_row + start + int(wrong.nonzero()[0])
        bad += int(wrong.sum())
    if bad:
        raise ValueError(
            f"{split} features must be finite, got NaN or infinity in {bad} of {len(features)} samples, first {first}; "
            "the encoder has diverged"
        )


def check_same_classes(train_data: str, test_data: str) -> None:
    """Refuse two `.beton` files whose labels mean different classes, as far as their manifests tell.

    Raises:
        ValueError: the first class that differs; or a file is missing or damaged.
    """
    manifests = []
    for path in (train_data, test_data):
        open_beton(path)
        manifests.append(load_manifest(path))
    train, test = manifests
    if train is not None and test is not None:
        check_classes(train.classes or [], test.classes or [], train_data, test_data)


def check_classes(train: list[str], test: list[str], train_data: str, test_data: str) -> None:
    """Refuse two sets whose labels mean different classes.

    Raises:
        ValueError: names the first that differs.
    """
    if train == test:
        return
    pairs = enumerate(zip_longest(train, test))
    label, (expected, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"`test_data` must have the classes of `train_data`, but label {label} is {found} in {test_data} and "
        f"{expected} in {train_data}; convert both from folders with the same class names"
    )


def _check_range(data: LabelledData, num_classes: int) -> None:
    wrong = data.labels >= num_classes
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"labels of {data.field} must be from 0 to {num_classes - 1}, {data.path} has {data.labels[row]} at sample "
            f"{row} and others in {int(wrong.sum())} of {len(wrong)}; give both splits the same classes"
        )


def _check_none_missing(data: LabelledData, classes: list[str] | None, num_classes: int) -> None:
    missing: NDArray[np.int64] = np.flatnonzero(np.bincount(data.labels, minlength=num_classes) == 0)
    if len(missing):
        names = [f"{label} ({classes[label]})" if classes else str(label) for label in missing[:NUM_NAMED].tolist()]
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{data.field} must hold samples of all {num_classes} classes, {data.path} has none of class "
            f"{', '.join(names)}{more}; add some, or leave the class out of both splits"
        )
