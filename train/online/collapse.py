"""Whether the encoder still tells images apart: the spread of its representations, the rank of its projections.

Two ways in which a self-supervised encoder fails (Jing et al., "Understanding Dimensional Collapse in Contrastive
Self-supervised Learning", 2022): everything is mapped to one point, or into a few directions.

- `representation_std`: the standard deviation over the images of each dimension of √D · h/‖h‖, averaged over the
  dimensions. 0 in one point, 1 on a filled sphere.
- `projection_rank`: the effective rank of the covariance of z/‖z‖: exp of the entropy of its eigenvalues, as shares of
  their sum (Roy & Vetterli, "The effective rank", 2007). From 1 to D; 0 where all projections coincide. RankMe (Garrido
  et al. 2023) takes the singular values of the rows themselves, not centred and not squared: it is larger.

Both are of the rows of all ranks, from their moments, which one all-reduce adds up in float64.

Legend: R local rows (views of images), G rows of all ranks, D width of h, E width of z.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import all_reduce_sum_

logger = logging.getLogger(__name__)

# Between what was measured on runs that learn and on collapsed ones: docs/guides/online_evaluation.md.
LOWEST_STD, LOWEST_RANK = 0.05, 3.0
SMALL = 4  # rank of at most so small a share of what there could be, where projections are narrow or few
RECOVERED = 1.5  # times the lowest: what ends an episode
PATIENCE = 3  # measurements in a row that agree, before something is said: single ones scatter
POINT = 1e-9  # of the summed variance of unit vectors: a hundred times float32's rounding, squared


class Spread(NamedTuple):
    """How a batch lies in space."""

    representation_std: float
    projection_rank: float
    largest_rank: int
    """That so many rows of such a width could have."""

    @property
    def is_finite(self) -> bool:
        """False where a row was NaN or infinite."""
        return math.isfinite(self.representation_std) and math.isfinite(self.projection_rank)

    @property
    def lowest_rank(self) -> float:
        """Below which it has collapsed."""
        return min(LOWEST_RANK, self.largest_rank / SMALL)

    def is_below(self, times: float) -> bool:
        """Whether a figure is below so many times its lowest."""
        return self.representation_std < LOWEST_STD * times or self.projection_rank < self.lowest_rank * times


class CollapseWatch:
    """Measures, and says in a line where a collapse begins and where it ends.

    Args:
        warmup_steps: before which nothing is said: the network is far from where it is going.
    """

    def __init__(self, *, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._collapsed = False
        self._in_a_row = 0  # measurements that contradict `_collapsed`

    def measure(
        self, representations: Sequence[Tensor] | Tensor, projections: Sequence[Tensor] | Tensor, *, step: int
    ) -> dict[str, float]:
        """Both figures, over the rows of all ranks. All ranks must call; waits for the device.

        Args:
            representations: h [R, D], whole or in pieces.
            projections: z [R, E], whole or in pieces.
            step: optimizer steps done.

        Returns:
            `representation_std` and `projection_rank`; NaN where a row is not finite.
        """
        spread = measure_spread(_rows(representations), _rows(projections))
        self.judge(spread, step)
        return {"representation_std": spread.representation_std, "projection_rank": spread.projection_rank}

    def judge(self, spread: Spread, step: int) -> None:
        """Take a measurement into account, and warn where the encoder has begun to collapse, or has recovered."""
        if step < self._warmup_steps or not spread.is_finite:
            return
        below = spread.is_below(RECOVERED if self._collapsed else 1.0)
        self._in_a_row = self._in_a_row + 1 if below != self._collapsed else 0
        if self._in_a_row < PATIENCE:
            return
        self._collapsed, self._in_a_row = below, 0
        if below:
            logger.warning(
                "step %d: the encoder collapses: %s; if the loss does not recover either, stop: try a smaller "
                "`optim.base_lr` or a longer warm-up, and see docs/guides/online_evaluation.md",
                step,
                _in_words(spread),
            )
        else:
            logger.warning(
                "step %d: the encoder tells images apart again (`representation_std` %.3g, `projection_rank` %.3g)",
                step,
                spread.representation_std,
                spread.projection_rank,
            )


def _in_words(spread: Spread) -> str:
    found = []
    if spread.representation_std < LOWEST_STD:
        found.append(
            "the representations of all images are almost the same (`representation_std` "
            f"{spread.representation_std:.2g}, below {LOWEST_STD:g})"
        )
    if spread.projection_rank < spread.lowest_rank:
        found.append(
            f"the projections of all images differ in hardly any direction (`projection_rank` "
            f"{spread.projection_rank:.2g}, below {spread.lowest_rank:g})"
        )
    return " and ".join(found)


@torch.no_grad()
def measure_spread(h: Tensor, z: Tensor) -> Spread:
    """Of h [R, D] and z [R, E] of all ranks; a rank may have other R than the others. All ranks must call."""
    h, z = F.normalize(h.double()), F.normalize(z.double())
    parts = [h.new_tensor([len(h)]), h.sum(0), h.square().sum(0), z.sum(0), (z.T @ z).flatten()]
    total = all_reduce_sum_(torch.cat(parts)).cpu()
    num_rows, width = int(total[0]), z.shape[1]
    largest_rank = min(width, num_rows - 1)
    total = total / num_rows
    if not bool(total.isfinite().all()):
        return Spread(math.nan, math.nan, largest_rank)
    _, h_mean, h_square, z_mean, z_square = torch.split(total, [len(part) for part in parts])
    std = (h_square - h_mean.square()).clamp(min=0).sqrt().mean() * h.shape[1] ** 0.5
    covariance = z_square.view(width, width) - torch.outer(z_mean, z_mean)
    return Spread(float(std), effective_rank(covariance), largest_rank)


def effective_rank(covariance: Tensor) -> float:
    """exp(−Σ p log p), p the eigenvalues of `covariance` [E, E] as shares of their sum; 0 where that is nothing."""
    if float(covariance.trace()) < POINT:
        return 0.0
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    return float((-torch.xlogy(shares, shares).sum()).exp())


def _rows(pieces: Sequence[Tensor] | Tensor) -> Tensor:
    return pieces if isinstance(pieces, Tensor) else torch.cat(list(pieces))
