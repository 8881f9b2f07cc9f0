"""Losses that are sums over pairs, over all ranks: exact loss and gradients, no matrix of all pairs.

The formulas stand in `model.losses.reference`. Each rank owns R = 2N rows (view 1, then view 2). With u the scaled rows
of `model.similarity`, so that s_ij = ⟨u_i, u_j⟩, and p(i) the positive of i (always on the same rank), a loss has terms
a and f, of the positive and of a negative, and a selection gives each negative of an anchor its weight v_ij:

    ℓ_i = a(s_ip) + Σ_{j ≠ i, p(i)} v_ij f(s_ij, s_ip)
    w_ij = v_ij ∂f/∂s_ij,    q_i = a'(s_ip) + Σ_j v_ij ∂f/∂s_ip
    du_i = 1/R [ Σ_{j ≠ i, p(i)} (w_ij + w_ji) u_j + (q_i + q_p(i)) u_p(i) ]

v is 1/(M − 2) for every negative of M rows (`model.losses.every_negative`), or 1 for the semi-hard one
(`model.losses.semi_hard`). w_ji is the part of u_i in the loss of row j; for it, a few numbers about row j are needed,
which the selection calls its summary. 1/R, not 1/M, makes the average of the ranks' gradients that of the global loss.

By `all_gather`, the forward gathers u and the summaries, and the backward communicates nothing. By `ring`, forward and
backward pass them from rank to rank.

Memory: u of all ranks (or two blocks of R rows), a few vectors of its shape, two tiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import collectives
from model.exchange import Block, Exchange, block_starts, check_exchange, gathered, ring
from model.inputs import check_projections
from model.similarity import chain_to_input_, clearly_below, positive_similarities, scaled_rows


class PairLossOutput(NamedTuple):
    """Means over this rank's 2N rows: their mean over the ranks is the global figure."""

    loss: Tensor
    """Scalar, fp32 (fp64 for fp64 input)."""
    contrastive_accuracy: Tensor
    """Scalar, detached: the share of rows whose positive is more similar than every negative of all ranks."""


class Terms(Protocol):
    """The terms of a loss, elementwise. s and p broadcast; at s = −∞, which stands for no pair, both results are 0."""

    @property
    def relative(self) -> bool:
        """Whether f depends on s − p, so that ∂f/∂p = −∂f/∂s; else on s alone."""

    def positive(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """a(p) and a'(p)."""

    def negative(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """f(s, p), into `out` if there is one."""

    def slope(self, s: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """∂f/∂s, into `out` if there is one; it may be s."""


class Place(NamedTuple):
    """Where this rank's R rows stand."""

    start: int
    """The first of them among the rows of all ranks."""
    num_rows: int
    """Rows of all ranks."""


class Scan(NamedTuple):
    """What a selection gathers in a walk over all negatives, per row of this rank [R]."""

    value: Tensor
    """Σ_j v_ij f(s_ij, s_ip)."""
    slope: Tensor
    """Σ_j w_ij; needed where the terms are relative, else anything."""
    hardest: Tensor
    """Maximum of s over the negatives; −∞ where there are none."""
    summary: tuple[Tensor, ...]
    """What the gradients of other rows must know of this one."""


class Selection(Protocol):
    """A module that says which negatives count, and walks them."""

    def scan(
        self, rows: Tensor, positive: Tensor, blocks: Iterable[tuple[int, Block]], place: Place, terms: Terms
    ) -> Scan:
        """See `Scan`.

        Args:
            rows: u of this rank [R, D], fp32 or fp64.
            positive: s_ip of the rows [R].
            blocks: the rows of all ranks, `(u [C, D],)`, each block after its start among them.
            place: where the rows stand among them.
            terms: of the loss.
        """

    def gradient(
        self, rows: Tensor, summary: tuple[Tensor, ...], block: Block, start: int, place: Place, terms: Terms
    ) -> Tensor:
        """Σ_j (w_ij + w_ji) u_j over the negatives in the block [R, D].

        Args:
            rows: as `scan`'s.
            summary: of the rows.
            block: rows and their summary, `(u [C, D], …)`.
            start: of the block.
            place: as `scan`'s.
            terms: as `scan`'s.
        """


class Settings(NamedTuple):
    """What a loss is computed with; not differentiated."""

    terms: Terms
    selection: Selection
    normalize: bool
    group: dist.ProcessGroup | None
    exchange: Exchange


def pair_loss(z1: Tensor, z2: Tensor, temperature: float | Tensor, settings: Settings) -> PairLossOutput:
    """Check all but the temperature, which not every loss has, and compute; collectives stay out of compiled graphs."""
    compute = _pair_loss
    if torch.compiler.is_compiling():
        # As a decorator it would import the compiler at every start.
        compute = torch.compiler.disable(_pair_loss)  # type: ignore[no-untyped-call]
    return PairLossOutput(*compute(z1, z2, temperature, settings))


def _pair_loss(z1: Tensor, z2: Tensor, temperature: float | Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    check_exchange(settings.exchange)
    check_projections(z1, z2, settings.group)
    with torch.autocast(z1.device.type, enabled=False):
        loss, accuracy = PairLossFunction.apply(z1, z2, temperature, settings)
        return loss, accuracy


class PairLossFunction(torch.autograd.Function):
    """(z1 [N, D], z2 [N, D], τ, settings) → (loss, contrastive accuracy), means over this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, temperature: float | Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy."""
        terms, group = settings.terms, settings.group
        u, norms = scaled_rows(z1, z2, temperature, settings.normalize)
        positive = positive_similarities(u)
        place = Place(collectives.rank(group) * len(u), collectives.world_size(group) * len(u))
        everyone = gathered((u,), group) if settings.exchange == "all_gather" else None
        blocks = [everyone] if everyone else ring((u,), group)
        scan = settings.selection.scan(u, positive, _placed(blocks, len(u), settings), place, terms)
        values, pull = terms.positive(positive)
        if terms.relative:
            pull = pull - scan.slope
        saved = (u, *scan.summary)
        if everyone:
            saved = everyone.tensors + gathered(scan.summary, group).tensors
        accuracy = (scan.hardest < clearly_below(positive)).to(u.dtype).mean()
        ctx.settings, ctx.temperature, ctx.dtype, ctx.place = settings, temperature, z1.dtype, place
        ctx.save_for_backward(pull, norms, *saved)
        ctx.mark_non_differentiable(accuracy)
        return (values + scan.value).mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """What reaches z1, z2 and τ."""
        pull, norms, *saved = ctx.saved_tensors
        settings, place, num_rows = ctx.settings, ctx.place, len(pull)
        if settings.exchange == "all_gather":
            blocks: Iterable[Block] = [Block(tuple(saved), place.start)]
            saved = [tensor[place.start : place.start + num_rows] for tensor in saved]
        else:
            blocks = ring(tuple(saved), settings.group)
        u, *summary = saved
        with torch.autocast(u.device.type, enabled=False):
            grad = torch.zeros_like(u)
            for start, block in _placed(blocks, num_rows, settings):
                grad += settings.selection.gradient(u, tuple(summary), block, start, place, settings.terms)
            pull = pull.view(2, -1, 1).sum(0)
            for grad_view, other in zip(grad.chunk(2), reversed(u.chunk(2)), strict=True):
                grad_view.addcmul_(pull, other)
            grad *= grad_loss / num_rows
            temperature_grad = chain_to_input_(grad, u, norms, ctx.temperature)
        z1_grad, z2_grad = grad.to(ctx.dtype).chunk(2)
        return z1_grad, z2_grad, temperature_grad if ctx.needs_input_grad[2] else None, None


def _placed(blocks: Iterable[Block], num_rows: int, settings: Settings) -> Iterable[tuple[int, Block]]:
    return zip(block_starts(num_rows, settings.exchange, settings.group), blocks, strict=True)
