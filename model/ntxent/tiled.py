"""NT-Xent in tiles over all ranks: exact loss and gradients, no 2N × 2N matrix, a backward that is local.

The formula stands in `model.ntxent.reference`. Each rank owns R = 2N rows (view 1, then view 2) and sees the
G = W·R rows of all ranks, in rank order. With u = z/(‖z‖√τ), so that s_ij = ⟨u_i, u_j⟩, p(i) the positive of
i (always on the same rank), and x_i = log Σ_{j ≠ i, p(i)} e^{s_ij} − s_ip(i) over the negatives:

    ℓ_i = log(1 + e^{x_i}),    L_i = s_ip(i) + ℓ_i    (the log-sum-exp over all j ≠ i)
    du_i = 1/R [ Σ_{j ≠ i, p(i)} (e^{s_ij − L_i} + e^{s_ij − L_j}) u_j − (σ(x_i) + σ(x_p(i))) u_p(i) ]

The first sum runs over the rows of all ranks; e^{s_ij − L_j} is the part of u_i in the loss of row j, and L_j
is all that it needs from there. So the forward gathers u and L, and the backward communicates nothing. 1/R,
not 1/G, makes the average of the ranks' gradients that of the global loss.

Both passes walk tiles of s. On this rank's own rows s is symmetric: a tile serves its rows and its columns,
and those below the diagonal are never computed. Every exponential is taken relative to a maximum, so any
temperature is safe. Memory: u of all ranks (G·D), one gradient (R·D), a few tiles.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import collectives
from model.ntxent.reference import NORM_EPS

CPU_TILE = 512  # a 1 MiB tile stays in the L2 cache; 256 and 1024 were 0–10 % slower (EPYC, one thread, 2026)
GPU_TILE = 2048  # a guess, to be measured: fewer, larger launches


def nt_xent_tiled(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    normalize: bool,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and contrastive accuracy of z1, z2 [N, D], means over this rank's 2N rows; all ranks must call.

    Raises:
        ValueError: N differs between ranks. Seen on CPU tensors only: asking would stall a GPU every step.
    """
    if z1.device.type == "cpu":
        collectives.check_equal_rows(z1, group)
    if tile_size is None:
        tile_size = CPU_TILE if z1.device.type == "cpu" else GPU_TILE
    loss, accuracy = _TiledNTXent.apply(z1, z2, _Settings(temperature, normalize, group, tile_size))
    return loss, accuracy


class _Settings(NamedTuple):
    temperature: float
    normalize: bool
    group: dist.ProcessGroup | None
    tile_size: int


class _TiledNTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        group, tile_size = settings.group, settings.tile_size
        u, norms = _scaled_rows(z1, z2, settings.temperature, settings.normalize)
        gathered = collectives.all_gather_rows(u, group)
        first = collectives.rank(group) * len(u)
        negatives, hardest, positive = _scan(gathered, first, len(u), tile_size)
        margin = negatives - positive  # x of the module's docstring
        losses = torch.logaddexp(margin, margin.new_zeros(()))
        lse = collectives.all_gather_rows(positive + losses, group)
        accuracy = (positive > hardest).to(losses.dtype).mean()
        ctx.settings, ctx.first, ctx.dtype = settings, first, z1.dtype
        ctx.save_for_backward(gathered, lse, margin, norms)
        ctx.mark_non_differentiable(accuracy)
        return losses.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        gathered, lse, margin, norms = ctx.saved_tensors
        with torch.autocast(gathered.device.type, enabled=False):
            grad = _gradient(gathered, lse, margin, ctx.first, ctx.settings.tile_size)
            grad *= grad_loss / len(grad)
            own = gathered[ctx.first : ctx.first + len(grad)]
            _chain_to_input_(grad, own, norms, ctx.settings.temperature)
        z1_grad, z2_grad = grad.to(ctx.dtype).chunk(2)
        return z1_grad, z2_grad, None


def _scaled_rows(z1: Tensor, z2: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The rows u [R, D], in the dtype computed in, and the rows' norms [R, 1] unless they stay."""
    u = torch.cat((z1, z2))
    u = u if u.dtype == torch.float64 else u.float()
    if not normalize:
        return u * temperature**-0.5, None
    norms = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u.mul_(temperature**-0.5 / norms.clamp_min(NORM_EPS)), norms


def _chain_to_input_(grad: Tensor, u: Tensor, norms: Tensor | None, temperature: float) -> None:
    """From du to dz in place, through u = z/(max(‖z‖, ε)·√τ): where ‖z‖ > ε the part along u is lost."""
    if norms is not None:
        along = torch.einsum("rd,rd->r", grad, u)[:, None]
        grad.addcmul_(u, along.mul_(-temperature).masked_fill_(norms <= NORM_EPS, 0.0))
        grad /= norms.clamp_min(NORM_EPS)
    grad *= temperature**-0.5


class _Tile(NamedTuple):
    """A tile of s that this rank computes."""

    rows: slice
    """Among this rank's R rows."""
    columns: slice
    """Among the G rows of all ranks."""
    mirror: slice | None
    """The columns as rows of this rank, where the transposed tile is to be used too."""
    diagonal: Literal["self", "positive", "negative"]
    """What stands on the tile's diagonal: s_ii, s_ip(i), or pairs like all others."""


def _tiles(first: int, num_rows: int, num_all: int, size: int) -> Iterator[_Tile]:
    """Tiles that cover s of this rank's rows, `first` … `first + num_rows` of `num_all`, each pair once.

    No tile crosses from one view to the other, so that self and positive pairs stand on diagonals of tiles.
    """
    num_images = num_rows // 2
    spans = [
        slice(start, min(start + size, view + num_images))
        for view in (0, num_images)
        for start in range(view, view + num_images, size)
    ]
    for block in range(0, num_all, num_rows):  # the rows of one rank
        for i, rows in enumerate(spans):
            for j, span in enumerate(spans):
                columns = slice(block + span.start, block + span.stop)
                if block != first:
                    yield _Tile(rows, columns, None, "negative")
                elif j == i:
                    yield _Tile(rows, columns, None, "self")
                elif j > i:
                    yield _Tile(rows, columns, span, "positive" if j - i == len(spans) // 2 else "negative")


def _similarity(u: Tensor, first: int, tile: _Tile, buffer: Tensor) -> Tensor:
    """The tile's s, written into `buffer`."""
    rows = u[first + tile.rows.start : first + tile.rows.stop]
    columns = u[tile.columns]
    return torch.mm(rows, columns.T, out=_view(buffer, len(rows), len(columns)))


def _scan(u: Tensor, first: int, num_rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of this rank [R]: log-sum-exp and maximum of s over its negatives, and its positive's s."""
    negatives = u.new_full((num_rows,), -math.inf)
    hardest = u.new_full((num_rows,), -math.inf)
    positive = u.new_empty(num_rows // 2)
    buffer = _buffer(u, num_rows, size)
    for tile in _tiles(first, num_rows, len(u), size):
        s = _similarity(u, first, tile, buffer)
        if tile.diagonal == "positive":
            positive[tile.rows] = s.diagonal()
        if tile.diagonal != "negative":
            s.fill_diagonal_(-math.inf)
        for span, dim in ((tile.rows, 1), (tile.mirror, 0)):
            if span is not None:
                torch.maximum(hardest[span], s.amax(dim), out=hardest[span])
                torch.logaddexp(negatives[span], s.logsumexp(dim), out=negatives[span])
    return negatives, hardest, positive.repeat(2)


def _gradient(u: Tensor, lse: Tensor, margin: Tensor, first: int, size: int) -> Tensor:
    """R·du of this rank's rows [R, D]; `lse` [G] of all ranks, `margin` [R] of this one."""
    num_rows = len(margin)
    own, own_lse = u[first : first + num_rows], lse[first : first + num_rows]
    grad = torch.zeros_like(own)
    buffer, second_buffer = _buffer(u, num_rows, size), _buffer(u, num_rows, size)
    for tile in _tiles(first, num_rows, len(u), size):
        s = _similarity(u, first, tile, buffer)
        if tile.diagonal != "negative":
            s.fill_diagonal_(-math.inf)
        weights = torch.sub(s, own_lse[tile.rows, None], out=_view(second_buffer, *s.shape)).exp_()
        weights += s.sub_(lse[tile.columns]).exp_()
        grad[tile.rows].addmm_(weights, u[tile.columns])
        if tile.mirror is not None:
            grad[tile.mirror].addmm_(weights.T, own[tile.rows])
    view1, view2 = own.chunk(2)
    pull = torch.sigmoid(margin).view(2, -1, 1).sum(0)
    for grad_view, other in zip(grad.chunk(2), (view2, view1), strict=True):
        grad_view.addcmul_(pull, other, value=-1)
    return grad


def _buffer(u: Tensor, num_rows: int, size: int) -> Tensor:
    return u.new_empty(min(size, num_rows // 2) ** 2)


def _view(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)
