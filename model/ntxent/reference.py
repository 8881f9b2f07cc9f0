"""NT-Xent by the letter of Eq. 1 of SimCLR (Chen et al. 2020): the whole 2N × 2N matrix, one process.

The formula, written here once. Row k of view 1 and row k of view 2 are positives. With z the 2N rows of both
views, each divided by its norm, and p(i) the positive of i:

    s_ij = ⟨z_i, z_j⟩ / τ
    ℓ_i  = −log( exp(s_ip(i)) / Σ_{j ≠ i} exp(s_ij) )
    loss = 1/(2N) Σ_i ℓ_i

google-research/simclr's code sums the means of the two views, so its loss is twice this. The contrastive
accuracy is the share of rows whose positive is strictly more similar than each of the 2N − 2 negatives: a
collapsed encoder, to which all rows are alike, earns nothing.

Shapes: N images, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.similarity import NORM_EPS


def nt_xent_reference(z1: Tensor, z2: Tensor, *, temperature: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Loss (differentiable) and contrastive accuracy of z1, z2 [N, D]; fp64 for fp64 input, else fp32."""
    z = torch.cat((z1, z2))
    z = z if z.dtype == torch.float64 else z.float()
    if normalize:
        z = z / z.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
    rows = torch.arange(len(z), device=z.device)
    positive_of = rows.roll(len(z1))
    similarity = (z @ z.T / temperature).masked_fill(rows[:, None] == rows, -torch.inf)
    positive = similarity[rows, positive_of]
    loss = (similarity.logsumexp(dim=1) - positive).mean()
    hardest_negative = similarity.detach().index_put((rows, positive_of), positive.new_tensor(-torch.inf)).amax(1)
    return loss, (positive.detach() > hardest_negative).to(z.dtype).mean()
