"""NT-Xent over all ranks: exact loss and gradients, no matrix of all pairs, no gradients sent between ranks.

The formula stands in `model.ntxent.reference`. Each rank owns R = 2N rows (view 1, then view 2). With u the scaled
rows of `model.similarity`, so that s_ij = ⟨u_i, u_j⟩, p(i) the positive of i (always on the same rank), and
x_i = log Σ_{j ≠ i, p(i)} e^{s_ij} − s_ip(i) over the negatives of all ranks:

    ℓ_i = log(1 + e^{x_i}),    L_i = s_ip(i) + ℓ_i    (the log-sum-exp over all j ≠ i)
    du_i = 1/R [ Σ_{j ≠ i, p(i)} (e^{s_ij − L_i} + e^{s_ij − L_j}) u_j − (σ(x_i) + σ(x_p(i))) u_p(i) ]

e^{s_ij − L_j} is the part of u_i in the loss of row j, and L_j is all that it needs from there. 1/R, not 1/(all
ranks' rows), makes the average of the ranks' gradients that of the global loss.

By `all_gather`, the forward gathers u and L, and the backward communicates nothing. By `ring`, forward and backward
pass u (and L) from rank to rank, and no rank ever holds more than two blocks of R rows.

A backend walks the similarities: `scan` gives the log-sum-exp and the maximum over negatives, `gradient` the sum over
them. The form of the rows, which ranks exchange as they are, belongs to the backend: `to_rows` makes them, `to_input`
takes the gradient back. Memory: u of all ranks (or two blocks), one gradient of this rank's rows, and what a backend
keeps in its tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.exchange import Block, Exchange, gathered, ring
from model.ntxent import float_rows
from model.ntxent.float_rows import Kept
from model.similarity import clearly_below


class Backend(Protocol):
    """A module that walks the similarities; `model.ntxent.tiled` says what its functions take and give."""

    def scan(self, rows: Tensor, columns: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and maximum over the negatives."""

    def gradient(self, rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None) -> Tensor:
        """What the negatives add to the gradient."""


class Rows(Protocol):
    """A module that makes rows for a backend; `model.ntxent.float_rows` says what its functions take and give."""

    def to_rows(
        self, z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """Rows, the positives' s, and what is kept for the way back."""

    def to_input(
        self, grad: Tensor, u: Tensor, kept: Kept, margin: Tensor, upstream: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What reaches z, both views, and τ."""


class Settings(NamedTuple):
    """What the loss is computed with; not differentiated."""

    normalize: bool
    group: dist.ProcessGroup | None
    exchange: Exchange
    backend: Backend
    rows: Rows = float_rows


class NTXentFunction(torch.autograd.Function):
    """(z1 [N, D], z2 [N, D], τ, settings) → (loss, contrastive accuracy), means over this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, temperature: float | Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy."""
        u, positive, kept = settings.rows.to_rows(z1, z2, temperature, settings.normalize)
        blocks: Iterable[Block] = ring((u,), settings.group)
        if settings.exchange == "all_gather":
            blocks = [gathered((u,), settings.group)]
        negatives, hardest = _scan(u, blocks, settings.backend)
        margin = negatives - positive  # x of the module's docstring
        losses = torch.logaddexp(margin, 0 * positive)  # NaN, not 0, where the positive's s is infinite
        lse = positive + losses
        accuracy = (hardest < clearly_below(positive)).to(losses.dtype).mean()
        ctx.settings, ctx.temperature, ctx.dtype = settings, temperature, z1.dtype
        saved = (u, lse)
        if settings.exchange == "all_gather":
            ((columns,), ctx.first), (column_lse,) = *blocks, gathered((lse,), settings.group).tensors
            saved = (columns, column_lse)
        ctx.save_for_backward(*saved, margin, *kept)
        ctx.mark_non_differentiable(accuracy)
        return losses.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """What reaches z1, z2 and τ."""
        u, lse, margin, *kept = ctx.saved_tensors
        num_rows, settings = len(margin), ctx.settings
        if settings.exchange == "all_gather":
            blocks: Iterable[Block] = [Block((u, lse), ctx.first)]
            u, lse = (tensor[ctx.first : ctx.first + num_rows] for tensor in (u, lse))
        else:
            blocks = ring((u, lse), settings.group)
        with torch.autocast(u.device.type, enabled=False):
            parts = (settings.backend.gradient(u, columns, lse, others, first) for (columns, others), first in blocks)
            grad, temperature_grad = settings.rows.to_input(
                functools.reduce(Tensor.add_, parts), u, tuple(kept), margin, grad_loss, ctx.temperature
            )
        z1_grad, z2_grad = grad.to(ctx.dtype).chunk(2)
        return z1_grad, z2_grad, temperature_grad if ctx.needs_input_grad[2] else None, None


def _scan(u: Tensor, blocks: Iterable[Block], backend: Backend) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum over the negatives of all blocks [R]."""
    (lse, hardest), *others = (backend.scan(u, columns, first) for (columns,), first in blocks)
    for block_lse, block_hardest in others:
        lse, hardest = torch.logaddexp(lse, block_lse), torch.maximum(hardest, block_hardest)
    return lse, hardest
