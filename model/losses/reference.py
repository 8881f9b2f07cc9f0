"""NT-Logistic and the margin triplet loss of SimCLR's Table 2 (Chen et al. 2020): whole matrices, one process.

The formulas, written here once. Row k of view 1 and row k of view 2 are positives. With z the 2N rows of both views,
each divided by its norm, p(i) the positive of i, K = 2N − 2, and sums over the negatives j ≠ i, p(i):

    NT-Logistic        s_ij = ⟨z_i, z_j⟩ / τ    ℓ_i = −log σ(s_ip(i)) − 1/K Σ_j log σ(−s_ij)
    margin triplet     s_ij = ⟨z_i, z_j⟩        ℓ_i = 1/K Σ_j max(s_ij − s_ip(i) + m, 0)
    loss = 1/(2N) Σ_i ℓ_i

The paper writes the terms of one negative and leaves open how those of many are put together. Here they are averaged:
positives and negatives weigh alike, whatever the batch, as in the paper's terms, and the learning rate need not know
its size.

With semi-hard mining (Schroff et al. 2015, FaceNet), a single negative stands in place of the mean: the closest that
is farther than the positive, n(i) = argmax_j {s_ij : s_ij < s_ip(i)}. An anchor for which there is none has no
negative term. The triplet's condition that it lie within the margin, s_in(i) > s_ip(i) − m, is in its maximum. Which
negative is chosen is not differentiated.

The contrastive accuracy is NT-Xent's: see `model.ntxent.reference`.

Shapes: N images, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.similarity import NORM_EPS, clearly_below


def nt_logistic_reference(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor, normalize: bool, semi_hard: bool
) -> tuple[Tensor, Tensor]:
    """Loss (differentiable) and contrastive accuracy of z1, z2 [N, D]; fp64 for fp64 input, else fp32."""
    positive, negatives = _similarities(z1, z2, normalize)
    positive, negatives = positive / temperature, negatives / temperature
    terms = _over_negatives(-F.logsigmoid(-negatives), positive, negatives, semi_hard)
    return (terms - F.logsigmoid(positive)).mean(), _accuracy(positive, negatives)


def margin_triplet_reference(
    z1: Tensor, z2: Tensor, *, margin: float, normalize: bool, semi_hard: bool
) -> tuple[Tensor, Tensor]:
    """As `nt_logistic_reference`."""
    positive, negatives = _similarities(z1, z2, normalize)
    terms = _over_negatives(F.relu(negatives - positive[:, None] + margin), positive, negatives, semi_hard)
    return terms.mean(), _accuracy(positive, negatives)


def _similarities(z1: Tensor, z2: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Of each row with its positive [2N], and with its negatives [2N, 2N − 2], in the order of the rows."""
    z = torch.cat((z1, z2))
    z = z if z.dtype == torch.float64 else z.float()
    if normalize:
        z = z / z.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
    rows = torch.arange(len(z), device=z.device)
    positive_of = rows.roll(len(z1))
    similarity = z @ z.T
    is_negative = (rows != rows[:, None]) & (rows != positive_of[:, None])
    return similarity[rows, positive_of], similarity[is_negative].view(len(z), len(z) - 2)


def _over_negatives(terms: Tensor, positive: Tensor, negatives: Tensor, semi_hard: bool) -> Tensor:
    """The mean of each row's terms, or the term of its semi-hard negative [2N]; 0 where there is none."""
    if not negatives.numel():
        return terms.sum(dim=1)  # a zero with a gradient
    if not semi_hard:
        return terms.mean(dim=1)
    candidates = negatives.detach().masked_fill(negatives >= clearly_below(positive)[:, None], -torch.inf)
    closest, chosen = candidates.max(dim=1)
    return terms.gather(1, chosen[:, None])[:, 0].where(closest != -torch.inf, 0.0)


def _accuracy(positive: Tensor, negatives: Tensor) -> Tensor:
    beaten = (negatives < clearly_below(positive)[:, None]).all(dim=1)
    return beaten.to(positive.dtype).mean().detach()
