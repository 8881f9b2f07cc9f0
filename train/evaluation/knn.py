"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4;
constants as in DINO's eval_knn.py: neighbours by cosine similarity s, each votes for its class with weight
exp(s / τ), τ = 0.07.

Similarities are made block by block, test rows × training rows, and what is kept of a block is what may still be
among the nearest. So memory does not grow with the training set, which may lie in a memory-mapped file.

N test samples, M training samples, D features, C classes, k neighbours; n and m, the rows of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.evaluation.checks import check_labelled
from train.evaluation.exact_products import exact_products

TEST_ROWS, TRAIN_ROWS = 8192, 4096  # n and m at most: 128 MiB of float32 similarities, large enough for BLAS and GPUs
COLUMN_MULTIPLE = 64  # MKL computes the last columns of other widths by another kernel, with other rounding
TIED_ROWS = 256  # whose ties are settled at a time


def nearest(train_x: Tensor, test_x: Tensor, k: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The k training features with the largest cosine similarity to each test feature.

    Equally near neighbours stand in the order of the training set, so that the result does not depend on the device,
    and the nearest j < k are the first j. All similarities of a test sample come from products of one shape: copies
    of a feature are equally near to the last bit, wherever they stand.

    Args:
        train_x: features [M, D], any floating dtype, on any device; read in blocks of rows, and never copied whole.
        test_x: features [N, D], likewise.
        k: from 1 to M.
        device: to compute on; by default that of `test_x`.

    Returns:
        Similarities, float32 (float64 of float64 features) [N, k], largest first, and rows of the training set,
        int64 [N, k]; on the CPU.

    Raises:
        ValueError: there are fewer than k training samples, or k < 1.
    """
    if not 1 <= k <= len(train_x):
        raise ValueError(
            f"`k` must be between 1 and {len(train_x)}, the number of training samples, got {k}; take fewer neighbours"
        )
    device = device or test_x.device
    with torch.no_grad(), exact_products(device):
        found = [_nearest_of_chunk(train_x, _unit_length(rows, device), k) for rows in torch.split(test_x, TEST_ROWS)]
    values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, rows


def votes(similarity: Tensor, labels: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """What the neighbours of each sample give to every class: the sum of exp((s − largest s) / τ).

    Relative to the nearest one, since exp(1 / τ) overflows at small τ; a common factor moves no vote. On the CPU,
    where they are added up in the order of the neighbours: on a GPU, rounding would differ from run to run.

    Args:
        similarity: [N, k], largest first.
        labels: of the neighbours, int64 [N, k], below `num_classes`.
        temperature: τ > 0.
        num_classes: C.

    Returns:
        float64 [N, C] on the CPU.

    Raises:
        ValueError: τ is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}; DINO's is 0.07")
    similarity = similarity.cpu().double()
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels.cpu(), weights)


def knn_predict(train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classify test features by their k nearest training features.

    Of equally near neighbours at the edge of the k the first ones in the training set count, and of classes with
    equal votes the lowest.

    Args:
        train_x: features [M, D], any floating dtype, on any device.
        train_y: labels [M], integers from 0.
        test_x: features [N, D]; what is computed is computed on their device.
        k: neighbours that vote, from 1 to M.
        temperature: τ > 0.

    Returns:
        Predicted labels, int64 [N], on the device of `test_x`.

    Raises:
        ValueError: k or τ is out of range.
    """
    similarity, rows = nearest(train_x, test_x, k)
    train_y = train_y.cpu().long()
    scores = votes(similarity, train_y[rows], temperature=temperature, num_classes=int(train_y.max()) + 1)
    return scores.argmax(dim=1).to(test_x.device)


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


def _nearest_of_chunk(train_x: Tensor, unit_test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` for n test features of length 1, one block of training features after the other."""
    values = unit_test.new_empty(len(unit_test), 0)
    rows = torch.empty(len(unit_test), 0, dtype=torch.int64, device=unit_test.device)
    width = min(TRAIN_ROWS, -(-len(train_x) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
    for start in range(0, len(train_x), width):
        block = _unit_length(train_x[start : start + width], unit_test.device).to(unit_test.dtype)
        padded = F.pad(block, (0, 0, 0, width - len(block)))
        similarity = (unit_test @ padded.T)[:, : len(block)]
        columns = _first_largest(similarity, min(k, len(block)))
        # Before are earlier rows, and both parts are in the order of rows where they tie: a stable sort keeps it.
        values = torch.cat([values, similarity.gather(1, columns)], dim=1)
        rows = torch.cat([rows, start + columns], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, rows = values[:, :k].contiguous(), rows.gather(1, order[:, :k])
    return values.cpu(), rows.cpu()


def _first_largest(similarity_nm: Tensor, k: int) -> Tensor:
    """The columns of the k largest of each row, rising; of equal ones the first columns."""
    values, columns = similarity_nm.topk(k, dim=1, sorted=False)
    edge = values.amin(dim=1, keepdim=True)
    # topk settles ties as it likes. They only matter where one crosses the edge.
    crossed = ((similarity_nm >= edge).sum(dim=1) > k).nonzero()[:, 0]
    for tied in torch.split(crossed, TIED_ROWS):
        columns[tied] = _first_of_tied(similarity_nm[tied], edge[tied], k)
    return columns.sort(dim=1).values


def _first_of_tied(similarity: Tensor, edge: Tensor, k: int) -> Tensor:
    """The same, where more than k columns are not below the edge: all above it, and the first that equal it."""
    above, equal = similarity > edge, similarity == edge
    room = k - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(dim=1) <= room))
    return taken.nonzero()[:, 1].view(-1, k)


def _unit_length(features: Tensor, device: torch.device) -> Tensor:
    """Rows of length 1, at least in float32: half precision would make ties of neighbours that differ."""
    return F.normalize(features.to(device, torch.promote_types(features.dtype, torch.float32)))
