"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4;
constants as in DINO's eval_knn.py: neighbours by cosine similarity s, each votes for its class with weight
exp(s / τ), τ = 0.07.

N test samples, M training samples, D features, C classes, k neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.evaluation.checks import check_labelled

CHUNK_BYTES = 128 * 2**20  # of similarities held at a time: fits a small machine, and is large enough for BLAS


def knn_predict(train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classify test features by their k nearest training features.

    Ties are settled by position, so that the result does not depend on the device: of equally near
    neighbours at the edge of the k the first ones in the training set count, and of classes with equal
    votes the lowest.

    Args:
        train_x: features [M, D], any floating dtype, on any device.
        train_y: labels [M], integers from 0.
        test_x: features [N, D], on the same device.
        k: neighbours that vote, from 1 to M.
        temperature: τ > 0.

    Returns:
        Predicted labels, int64 [N].
    """
    if not 1 <= k <= len(train_x):
        raise ValueError(f"`k` must be between 1 and {len(train_x)}, the number of training samples, got {k}")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}; DINO's is 0.07")
    train_x, test_x = _unit_length(train_x), _unit_length(test_x)
    num_classes = int(train_y.max()) + 1
    chunk = max(1, CHUNK_BYTES // (len(train_x) * train_x.element_size()))
    predictions = []
    for rows in torch.split(test_x, chunk):
        similarity, neighbours = _nearest(rows @ train_x.T, k)
        # Relative to the nearest one, since exp(1 / τ) overflows at small τ; a common factor moves no vote.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(rows), num_classes).scatter_add_(1, train_y[neighbours], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test samples, in [0, 1], that `knn_predict` classifies rightly."""
    check_labelled(train_x, train_y, test_x, test_y)
    predicted = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature)
    return float((predicted == test_y).double().mean())


def _unit_length(features: Tensor) -> Tensor:
    """Rows of length 1, at least in float32: half precision would make ties of neighbours that differ."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)))


def _nearest(similarity_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, largest first; of equal ones the first columns."""
    values, columns = similarity_NM.topk(k, dim=1)
    # topk settles ties as it likes. They only matter where one crosses the edge: sort those few rows stably.
    crossed = ((similarity_NM >= values[:, -1:]).sum(dim=1) > k).nonzero()[:, 0]
    if len(crossed) > 0:
        order = similarity_NM[crossed].argsort(dim=1, descending=True, stable=True)[:, :k]
        columns[crossed] = order
    return values, columns
