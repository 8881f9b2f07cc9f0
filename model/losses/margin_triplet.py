"""The margin triplet loss over the global batch: a positive should be more similar than a negative, by a margin.

The formula stands in `model.losses.reference`; `model.losses.pairs` computes it over all ranks without the 2N × 2N
matrix. It has no temperature: similarities are cosines (inner products without normalisation), and the margin is in
their unit. Dividing both by τ would only scale the loss.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import Exchange
from model.losses import every_negative
from model.losses import semi_hard as semi_hard_negative
from model.losses.pairs import PairLossOutput, Settings, pair_loss

DEFAULT_MARGIN = 0.4  # SimCLR tried 0, 0.4, 0.8 and 1.6 (appendix B), and does not say which was best


def margin_triplet(
    z1: Tensor,
    z2: Tensor,
    *,
    margin: float = DEFAULT_MARGIN,
    normalize: bool = True,
    semi_hard: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "all_gather",
) -> PairLossOutput:
    """SimCLR's margin triplet loss for the two views' projections, with the negatives of all ranks of `group`.

    Args:
        z1: as `nt_logistic`'s, and so are all arguments but the margin.
        z2: view 2.
        margin: m ≥ 0, in the unit of the similarities: cosines, which differ by 2 at most.
        normalize: divide each row by its norm first.
        semi_hard: of an anchor's negatives, only the closest that is farther than its positive; within the margin, or
            its term is 0.
        group: the ranks that share the batch; default: all.
        exchange: see `model.exchange`.

    Raises:
        ValueError: as `nt_logistic`'s, and a margin that is not a finite number ≥ 0.
    """
    if not (margin >= 0 and math.isfinite(margin)):
        raise ValueError(f"`margin` must be a finite number ≥ 0, got {margin}; SimCLR tried 0, 0.4, 0.8 and 1.6")
    selection = semi_hard_negative if semi_hard else every_negative
    settings = Settings(Hinge(margin), selection, normalize, group, exchange)
    return pair_loss(z1, z2, 1.0, settings)


class Hinge(NamedTuple):
    """a(p) = 0, f(s, p) = max(s − p + m, 0); see `model.losses.pairs.Terms`."""

    margin: float
    relative: bool = True

    def positive(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """See `Terms`."""
        zero = torch.zeros_like(p)
        return zero, zero

    def negative(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Terms`."""
        return torch.sub(s, p - self.margin, out=out).clamp_min_(0.0)

    def slope(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Terms`; 0 at the kink, as in the paper."""
        return torch.gt(s, p - self.margin, out=torch.empty_like(s) if out is None else out)
