"""How good an encoder is, by someone who trained none of them: torchvision's network and scikit-learn's classifiers.

An encoder is its weights under torchvision's names, whoever trained it. The representation h is the same code for all:
whole images, float32 in [0, 1], running statistics of batch norm.

Shapes: n images, D width of h.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.peers.lightly_training import Settings, narrow_resnet, read_images
from pipelines.beton import open_beton
from train.checkpoint import latest_checkpoint, load_checkpoint

NUM_NEIGHBOURS = 20
BATCH_SIZE = 500
ENCODER = "encoder."


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of the test images that are classified rightly."""

    knn: float
    """By the nearest neighbours of the training images, in cosine, alike in weight."""
    linear: float
    """By logistic regression on standardised h, with scikit-learn's own penalty."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Raw images of one size and their classes."""

    images: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]


def read_labelled(beton: Path, rows: NDArray[np.int64] | None = None) -> LabelledImages:
    """A raw `.beton`, or some of its rows.

    Raises:
        ValueError: it has no labels.
    """
    labels = open_beton(beton).labels
    if labels is None:
        raise ValueError(f"{beton} must have labels; convert a folder with one folder for each class")
    return LabelledImages(images=read_images(beton, rows), labels=labels if rows is None else labels[rows])


def encoder_of_run(run_dir: Path) -> dict[str, Tensor]:
    """The encoder of a run's newest checkpoint."""
    path = latest_checkpoint(run_dir)
    assert path is not None, f"{run_dir} holds no checkpoint"
    return encoder_of(load_checkpoint(path).model)


def encoder_of(method: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder out of the state of a method."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in method.items() if name.startswith(ENCODER)}


def accuracy_of(
    encoder: dict[str, Tensor], settings: Settings, train: LabelledImages, test: LabelledImages
) -> Accuracy:
    """Train classifiers on h of `train`, judge them on `test`."""
    h_train, h_test = (representations(encoder, settings, part.images) for part in (train, test))
    return classify(h_train, train.labels, h_test, test.labels)


@torch.inference_mode()
def representations(
    encoder: dict[str, Tensor], settings: Settings, images: list[NDArray[np.uint8]]
) -> NDArray[np.float32]:
    """Representations h of images, float32 [n, D]."""
    network = narrow_resnet(settings.blocks, settings.width, settings.stem)
    network.load_state_dict(encoder)
    network.eval()
    batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
    h = [network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255) for batch in batches]
    return torch.cat(h).numpy()


def classify(
    h_train: NDArray[np.float32], train: NDArray[np.int64], h_test: NDArray[np.float32], test: NDArray[np.int64]
) -> Accuracy:
    """Of representations [n, D] and classes [n]."""
    knn = KNeighborsClassifier(n_neighbors=NUM_NEIGHBOURS, metric="cosine", algorithm="brute").fit(h_train, train)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(h_train, train)
    return Accuracy(knn=float(knn.score(h_test, test)), linear=float(linear.score(h_test, test)))
