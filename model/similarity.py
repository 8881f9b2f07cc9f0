"""Scaled similarities s_ij = ⟨u_i, u_j⟩ between rows: what they are made from, and in which tiles they are walked.

With the projections z, the rows are u = z/(‖z‖·√τ), or u = z/√τ without normalisation: so the temperature τ and the
norms touch R·D numbers, and never a matrix of similarities.

The gradient goes back through u alone. For a loss that depends on z and τ only through the s_ij, which are bilinear
in u, 2τ·dL/dτ = −Σ_i ⟨u_i, dL/du_i⟩.

Shapes: R = 2N rows on this rank (view 1, then view 2), C columns, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-6  # tf.math.l2_normalize's bound: 1e-12 on the squared norm
CPU_TILE = 512  # a 1 MiB tile stays in the L2 cache; 256 and 1024 were 0–10 % slower (EPYC, one thread, 2026)
GPU_TILE = 2048  # a guess, to be measured: fewer, larger launches
TIED = 128  # in units of eps: equal rows differed by up to 22 between tiles (D = 4,096; EPYC, 2026)


def scaled_rows(z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The rows u [R, D], fp64 for fp64 input, else fp32; and the norms of z [R, 1] unless they stay."""
    u = torch.cat((z1, z2))
    u = u if u.dtype == torch.float64 else u.float()
    if not normalize:
        return u * temperature**-0.5, None
    norms = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u.mul_(temperature**-0.5 / norms.clamp_min(NORM_EPS)), norms


def chain_to_input_(grad: Tensor, u: Tensor, norms: Tensor | None, temperature: float | Tensor) -> Tensor:
    """From dL/du to dL/dz [R, D], in place; returns dL/dτ, a scalar.

    Where ‖z‖ > NORM_EPS the part of the gradient along u is lost in the normalisation.
    """
    along = torch.einsum("rd,rd->r", grad, u)[:, None]
    temperature_grad = along.sum() / (-2 * temperature)
    if norms is not None:
        grad.addcmul_(u, (along * -temperature).masked_fill_(norms <= NORM_EPS, 0.0))
        grad /= norms.clamp_min(NORM_EPS)
    grad *= temperature**-0.5
    return temperature_grad


def positive_similarities(u: Tensor) -> Tensor:
    """The s of each row with its positive, the same image's other view [R]."""
    view1, view2 = u.chunk(2)
    return torch.einsum("rd,rd->r", view1, view2).repeat(2)


def clearly_below(positive: Tensor) -> Tensor:
    """What a negative's s must be below to count as less than the positive's `positive` [R].

    Equal rows have equal similarities only to rounding, which depends on the tile: so that a collapsed encoder is
    seen as one, what is within a few roundings is a tie.
    """
    return positive - TIED * torch.finfo(positive.dtype).eps * positive.abs()


class Tile(NamedTuple):
    """A tile of s that this rank computes."""

    rows: slice
    """Among this rank's R rows."""
    columns: slice
    """Among the C columns."""
    mirror: slice | None
    """The columns as rows of this rank, where the transposed tile is to be used too."""
    diagonal: Literal["self", "positive", "negative"]
    """What stands on the tile's diagonal: s_ii, the positive's s, or pairs like all others."""


@functools.lru_cache(maxsize=16)
def tiles(num_rows: int, num_columns: int, first: int | None, size: int) -> tuple[Tile, ...]:
    """Tiles that cover s of this rank's rows against the columns, each pair of rows once.

    Where the rows are among the columns, at `first`, s is symmetric there, and the tiles below the diagonal are left
    to their mirrors. No tile crosses from one view of a rank to the other, so that self and positive pairs stand on
    diagonals of tiles. The columns are whole blocks of `num_rows`.
    """
    return tuple(_tiles(num_rows, num_columns, first, size))


def _tiles(num_rows: int, num_columns: int, first: int | None, size: int) -> Iterator[Tile]:
    num_images = num_rows // 2
    spans = [
        slice(start, min(start + size, view + num_images))
        for view in (0, num_images)
        for start in range(view, view + num_images, size)
    ]
    for block in range(0, num_columns, num_rows):  # the rows of one rank
        for i, rows in enumerate(spans):
            for j, span in enumerate(spans):
                columns = slice(block + span.start, block + span.stop)
                if block != first:
                    yield Tile(rows, columns, None, "negative")
                elif j == i:
                    yield Tile(rows, columns, None, "self")
                elif j > i:
                    yield Tile(rows, columns, span, "positive" if j - i == len(spans) // 2 else "negative")


def default_tile_size(u: Tensor) -> int:
    """A good side of the tiles for the device of u, in torch."""
    return CPU_TILE if u.device.type == "cpu" else GPU_TILE


def similarity(rows: Tensor, columns: Tensor, tile: Tile, buffer: Tensor) -> Tensor:
    """The tile's s, written into `buffer` (see `tile_buffer`)."""
    own, others = rows[tile.rows], columns[tile.columns]
    return torch.mm(own, others.T, out=in_buffer(buffer, len(own), len(others)))


def tile_buffer(u: Tensor, size: int) -> Tensor:
    """Memory for a tile of rows u [R, D]."""
    return u.new_empty(min(size, len(u) // 2) ** 2)


def in_buffer(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The front of a buffer as a matrix."""
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)
