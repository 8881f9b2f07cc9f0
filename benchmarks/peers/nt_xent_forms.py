"""NT-Xent as others compute it, on one process: with similarity matrices over the whole batch.

Written from the formulas, as equivalents of the published code: the same tensors of the same shapes, so that time and
memory can be compared.

- `google_nt_xent`: google-research/simclr, objective.py. Each view's N rows have their logits against the other view
  and against their own, where the row itself is pushed down by 1e9; the labels are a one-hot matrix; the views' mean
  cross entropies are *added*, which is twice the mean over 2N of the paper's Eq. 1.
- `lightly_nt_xent`: lightly 1.5, `NTXentLoss` without a memory bank. The row itself is cut out with a mask; one cross
  entropy over 2N rows, the paper's Eq. 1.

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


def lightly_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The paper's loss."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    num_images = len(z1)
    not_itself = ~torch.eye(num_images, dtype=torch.bool)

    def view_logits(own: Tensor, other: Tensor) -> Tensor:
        against_own = torch.einsum("id,jd->ij", own, own) / temperature
        against_other = torch.einsum("id,jd->ij", own, other) / temperature
        return torch.cat((against_other, against_own[not_itself].view(num_images, -1)), 1)

    logits = torch.cat((view_logits(z1, z2), view_logits(z2, z1)))
    return F.cross_entropy(logits, torch.arange(num_images).repeat(2))
