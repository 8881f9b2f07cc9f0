"""NT-Xent against keys: a memory network's projections of the batch, and those of earlier batches that are kept.

Sources: He et al. 2020, "Momentum Contrast"; Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised
Learners", section 2, whose authors say of it that "the contrasting examples are from momentum encoder from current and
past batches" (google-research/simclr, issue 115). With q_i the 2N rows of both views, k_j the memory network's
projections of the same rows, m_l those that the memory holds, each divided by its norm, and p(i) the other view of i:

    s_ij = ⟨q_i, k_j⟩ / τ,   t_il = ⟨q_i, m_l⟩ / τ
    ℓ_i  = −log( exp(s_ip(i)) / ( Σ_{j ≠ i} exp(s_ij) + Σ_l exp(t_il) ) )
    loss = 1/(2N) Σ_i ℓ_i

With keys that are the rows themselves and an empty memory its value is that of NT-Xent. Keys carry no gradient, so that
no rank's gradient depends on another's rows: with L_i the logarithm of the denominator of ℓ_i,

    dq_i = 1/(2N τ) ( Σ_{j ≠ i} e^{s_ij − L_i} k_j + Σ_l e^{t_il − L_i} m_l − k_p(i) )

Both passes walk the similarities in tiles; beside a tile they hold the keys and the memory, O((N + K) D).

Legend: N images and R = 2N rows of this rank (view 1, then view 2), W ranks, K places of the memory, C = W·R + K
columns, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import collectives
from model.losses.pairs import PairLossOutput
from model.similarity import NORM_EPS, clearly_below, default_tile_size


def unit_rows(z: Tensor, normalize: bool) -> Tensor:
    """Rows [R, D] as the loss compares them, fp64 for fp64 input, else fp32: divided by their norms if `normalize`."""
    z = z if z.dtype == torch.float64 else z.float()
    return F.normalize(z, dim=1, eps=NORM_EPS) if normalize else z


def memory_nt_xent(
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    filled: Tensor,
    *,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> PairLossOutput:
    """The loss of this rank's rows, and how often the positive is the most similar of all. No collectives.

    The mean over the ranks of losses, and of gradients, is that of the global batch.

    Args:
        queries: rows of this rank [R, D], of `unit_rows`; they alone (and τ) receive a gradient.
        keys: of the rows of all ranks [W·R, D], in rank order, of `unit_rows`.
        memory: keys of earlier batches [K, D].
        filled: bool [K], which places of the memory count.
        temperature: τ > 0; a scalar tensor receives a gradient.
        group: the ranks that share the batch; default: all.
        tile_size: side of a tile, for tests.
    """
    first = collectives.rank(group) * len(queries)
    with torch.autocast(queries.device.type, enabled=False):
        columns = torch.cat((keys, memory.to(keys.dtype))).detach()
        absent = torch.cat((filled.new_zeros(len(keys)), ~filled))
        penalty = torch.zeros_like(columns[:, 0]).masked_fill_(absent, -math.inf)
        size = tile_size or default_tile_size(queries)
        loss, accuracy = _MemoryNTXent.apply(queries / temperature, columns, penalty, first, size)
    return PairLossOutput(loss, accuracy)


def memory_nt_xent_reference(
    queries: Tensor, keys: Tensor, memory: Tensor, *, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The formula with whole matrices, in one process: loss (differentiable) and accuracy.

    Args:
        queries: q [R, D].
        keys: k [R, D], of the same rows.
        memory: m [K, D], all of which count.
        temperature: τ.
    """
    rows = torch.arange(len(queries))
    positive_of = rows.roll(len(rows) // 2)
    s = (queries @ keys.T / temperature).masked_fill(rows[:, None] == rows, -math.inf)
    t = queries @ memory.T / temperature
    everything = torch.cat((s, t), dim=1)
    positive = s[rows, positive_of]
    negatives = everything.detach().index_put((rows, positive_of), positive.new_tensor(-math.inf))
    loss = (everything.logsumexp(dim=1) - positive).mean()
    return loss, (positive.detach() > negatives.amax(1)).to(queries.dtype).mean()


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    s: Tensor
    """Similarities to negatives; −∞ at all else."""


class _MemoryNTXent(torch.autograd.Function):
    """(u = q/τ [R, D], columns [C, D], penalty [C], first, tile size) → (loss, accuracy)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, columns: Tensor, penalty: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Loss and accuracy."""
        own = columns[first : first + len(u)]
        positive_keys = own.roll(len(u) // 2, dims=0)
        positive = torch.einsum("rd,rd->r", u, positive_keys)
        lse, hardest = (torch.full_like(positive, -math.inf) for _ in range(2))
        for rows, _, s in _tiles(u, columns, penalty, first, size):
            torch.maximum(hardest[rows], s.amax(1), out=hardest[rows])
            torch.logaddexp(lse[rows], s.logsumexp(1), out=lse[rows])
        margin = lse - positive
        losses = torch.logaddexp(margin, 0 * positive)  # NaN, not 0, where the positive's s is infinite
        ctx.first, ctx.size = first, size
        ctx.save_for_backward(u, columns, penalty, positive + losses, margin)
        accuracy = (hardest < clearly_below(positive)).to(u.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        return losses.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        """What reaches u."""
        u, columns, penalty, lse, margin = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            own = columns[ctx.first : ctx.first + len(u)]
            grad = own.roll(len(u) // 2, dims=0) * -torch.sigmoid(margin)[:, None]
            for rows, span, s in _tiles(u, columns, penalty, ctx.first, ctx.size):
                grad[rows].addmm_(s.sub_(lse[rows, None]).exp_(), columns[span])
            return grad.mul_(grad_loss / len(u)), None, None, None, None


def _tiles(u: Tensor, columns: Tensor, penalty: Tensor, first: int, size: int) -> Iterator[_Tile]:
    """Tiles over all pairs; no tile has rows of both views, so that positives stand on a diagonal."""
    num_images = len(u) // 2
    width = max(size * size // max(min(size, num_images), 1), 1)
    for view, to_positive in ((0, num_images), (num_images, -num_images)):
        for start in range(view, view + num_images, size):
            rows = slice(start, min(start + size, view + num_images))
            for column in range(0, len(columns), width):
                span = slice(column, min(column + width, len(columns)))
                s = torch.addmm(penalty[span], u[rows], columns[span].T)
                own = first + start - column
                for offset in (own, own + to_positive):
                    s.diagonal(offset).fill_(-math.inf)
                yield _Tile(rows, span, s)
