"""NT-Logistic over the global batch: each pair is judged alone, by the logistic loss of its similarity.

The formula stands in `model.losses.reference`; `model.losses.pairs` computes it over all ranks without the 2N × 2N
matrix.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.exchange import Exchange
from model.inputs import check_temperature
from model.losses import every_negative
from model.losses import semi_hard as semi_hard_negative
from model.losses.pairs import PairLossOutput, Settings, pair_loss


def nt_logistic(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    semi_hard: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "all_gather",
) -> PairLossOutput:
    """SimCLR's NT-Logistic for the two views' projections, with the negatives of all ranks of `group`.

    All ranks must call, with equal N and the same upstream gradient. The mean over ranks of the local losses is the
    global loss, and gradients averaged over ranks are the global loss's gradient.

    Args:
        z1: projections of view 1 [N, D], fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64), under
            autocast too.
        z2: projections of view 2, row by row of the same images.
        temperature: τ > 0; a scalar tensor receives a gradient, and is not looked at.
        normalize: divide each row by its norm first.
        semi_hard: of an anchor's negatives, only the closest that is farther than its positive.
        group: the ranks that share the batch; default: all.
        exchange: see `model.exchange`.

    Raises:
        ValueError: shapes or dtypes that do not fit; τ ≤ 0; an unknown exchange; N that differs between ranks (seen
            on the CPU only: see `model.inputs.check_projections`).
    """
    temperature = check_temperature(temperature)
    selection = semi_hard_negative if semi_hard else every_negative
    settings = Settings(Logistic(), selection, normalize, group, exchange)
    return pair_loss(z1, z2, temperature, settings)


class Logistic:
    """a(p) = −log σ(p), f(s) = −log σ(−s); see `model.losses.pairs.Terms`."""

    relative = False

    def positive(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """See `Terms`."""
        return -F.logsigmoid(p), -torch.sigmoid(-p)

    def negative(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Terms`; exact at any s, where softplus with its threshold is not."""
        return torch.logaddexp(s, s.new_zeros(()), out=out)

    def slope(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Terms`."""
        return torch.sigmoid(s, out=out)
