"""NT-Xent as programs compute it that cannot be installed beside today's torch: matrices over the whole batch.

Written from the formulas, as equivalents of the published code: the same tensors of the same shapes, so that time and
memory can be compared.

- `google_nt_xent`: google-research/simclr, objective.py (TensorFlow). Each view's N rows have their logits against the
  other view and against their own, where the row itself is pushed down by 1e9; the labels are a one-hot matrix; the
  views' mean cross entropies are *added*, which is twice the mean over 2N of the paper's Eq. 1.
- `solo_learn_nt_xent`: solo-learn 1.0, losses/simclr.py (its release asks for torch 1.9). Exponentials of all
  similarities, summed under a mask of the positives and one of the negatives; the paper's Eq. 1. Without a maximum
  taken off, it overflows at temperatures below about 0.011.

Shapes: N images, D width; z1 and z2 are [N, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1e9  # google's


def google_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Twice the paper's loss."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    num_images = len(z1)
    itself = torch.eye(num_images, dtype=z1.dtype) * LARGE
    labels = torch.eye(num_images, 2 * num_images, dtype=z1.dtype)

    def view_loss(own: Tensor, other: Tensor) -> Tensor:
        against_own = own @ own.T / temperature - itself
        against_other = own @ other.T / temperature
        return F.cross_entropy(torch.cat((against_other, against_own), 1), labels)

    return view_loss(z1, z2) + view_loss(z2, z1)


def solo_learn_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The paper's loss."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    images = torch.arange(len(z1)).repeat(2)
    exponentials = torch.exp(torch.einsum("id,jd->ij", z, z) / temperature)
    is_positive = (images[:, None] == images).fill_diagonal_(False)
    is_negative = images[:, None] != images
    positive = (exponentials * is_positive).sum(1)
    negative = (exponentials * is_negative).sum(1)
    return -torch.log(positive / (positive + negative)).mean()
