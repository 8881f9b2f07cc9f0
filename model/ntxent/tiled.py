"""NT-Xent's two passes over the similarities in tiles, in torch: any device, fp32 or fp64, no matrix of all pairs.

On this rank's own rows s is symmetric: a tile serves its rows and its columns, and those below the diagonal are never
computed. Every exponential is taken relative to a maximum, so any temperature is safe.

`scan` and `gradient` are what every backend has; `model.ntxent.autograd` says what they are for.

Shapes: R = 2N rows of this rank (view 1, then view 2); C columns, blocks of R rows of one rank each; D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.similarity import default_tile_size, in_buffer, similarity, tile_buffer, tiles


def scan(rows: Tensor, columns: Tensor, first: int | None, tile_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Per row [R]: log-sum-exp and maximum of s over the negatives among the columns; −∞ where there are none.

    Args:
        rows: u of this rank [R, D], fp32 or fp64.
        columns: u of ranks [C, D], of the same dtype.
        first: where this rank's rows start among the columns, None if they are not there. There, a row itself and its
            positive are no negatives.
        tile_size: side of a tile.
    """
    size = tile_size or default_tile_size(rows)
    lse = rows.new_full((len(rows),), -math.inf)
    hardest = rows.new_full((len(rows),), -math.inf)
    buffer = tile_buffer(rows, size)
    for tile in tiles(len(rows), len(columns), first, size):
        s = similarity(rows, columns, tile, buffer)
        if tile.diagonal != "negative":
            s.fill_diagonal_(-math.inf)
        for span, dim in ((tile.rows, 1), (tile.mirror, 0)):
            if span is not None:
                torch.maximum(hardest[span], s.amax(dim), out=hardest[span])
                torch.logaddexp(lse[span], s.logsumexp(dim), out=lse[span])
    return lse, hardest


def gradient(
    rows: Tensor,
    columns: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    first: int | None,
    tile_size: int | None = None,
) -> Tensor:
    """Σ_j (e^{s_ij − L_i} + e^{s_ij − L_j}) u_j over the negatives among the columns [R, D].

    Args:
        rows: as `scan`'s.
        columns: as `scan`'s.
        row_lse: L of the rows [R].
        column_lse: L of the columns [C].
        first: as `scan`'s.
        tile_size: side of a tile.
    """
    size = tile_size or default_tile_size(rows)
    grad = torch.zeros_like(rows)
    buffer, second_buffer = tile_buffer(rows, size), tile_buffer(rows, size)
    for tile in tiles(len(rows), len(columns), first, size):
        s = similarity(rows, columns, tile, buffer)
        if tile.diagonal != "negative":
            s.fill_diagonal_(-math.inf)
        weights = torch.sub(s, row_lse[tile.rows, None], out=in_buffer(second_buffer, *s.shape)).exp_()
        weights += s.sub_(column_lse[tile.columns]).exp_()
        grad[tile.rows].addmm_(weights, columns[tile.columns])
        if tile.mirror is not None:
            grad[tile.mirror].addmm_(weights.T, rows[tile.rows])
    return grad
