"""The labels of a training set, for methods that learn from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.build import Data, ImageFolder, Subset


def labels_of(data: Data) -> NDArray[np.int64] | None:
    """The label of every image, int64 [n], −1 where it has none; None: there are no labels at all."""
    if isinstance(data, Subset):
        labels_of_all = labels_of(data.whole)
        return None if labels_of_all is None else labels_of_all[data.rows]
    if data.labels is not None:
        labels = np.asarray(data.labels, np.int64)
    elif isinstance(data, ImageFolder):
        from pipelines.folder_dataset import list_images  # needs Pillow and torchvision, as no other loader does

        labels = np.array([label for _, label in list_images(data.root)], np.int64)
    else:
        return None
    return labels if (labels >= 0).any() else None


def check_labels(data: Data, num_classes: int, *, path: str) -> None:
    """Refuse a set with an image whose label is not one of `num_classes`.

    Args:
        data: from `pipelines.build.open_data`.
        num_classes: labels are to be 0 to `num_classes` − 1.
        path: of the data, for the message.

    Raises:
        ValueError: names the first such image and its label.
    """
    labels = labels_of(data)
    if labels is None:
        raise ValueError(f"{path} has no labels to learn from; convert a folder with one folder for each class")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = int(outside.argmax())
        row = int(data.rows[first]) if isinstance(data, Subset) else first
        raise ValueError(
            f"labels of {path} must be from 0 to {num_classes - 1} (`model.classifier.num_classes` {num_classes}), "
            f"got {labels[first]} at sample {row} and in {int(outside.sum())} of {len(labels)}; set it to the number "
            "of classes, or label every image"
        )
