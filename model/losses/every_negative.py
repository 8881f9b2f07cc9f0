"""Every negative of an anchor counts alike, with 1/(M − 2) of M rows: walked in tiles, in torch, on any device.

On this rank's own rows s is symmetric: a tile serves its rows and its columns, and those below the diagonal are never
computed. A row's summary is the similarity of its positive, s_ip.

`model.losses.pairs` says what `scan` and `gradient` take and give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model.exchange import Block
from model.losses.pairs import Place, Scan, Terms
from model.similarity import default_tile_size, in_buffer, similarity, tile_buffer, tiles


def scan(
    rows: Tensor,
    positive: Tensor,
    blocks: Iterable[tuple[int, Block]],
    place: Place,
    terms: Terms,
    tile_size: int | None = None,
) -> Scan:
    """See `model.losses.pairs.Selection.scan`."""
    size = tile_size or default_tile_size(rows)
    value, slope = torch.zeros_like(positive), torch.zeros_like(positive)
    hardest = torch.full_like(positive, -math.inf)
    buffer, second_buffer = tile_buffer(rows, size), tile_buffer(rows, size)
    for _, ((columns,), first) in blocks:
        for tile in tiles(len(rows), len(columns), first, size):
            s = similarity(rows, columns, tile, buffer)
            if tile.diagonal != "negative":
                s.fill_diagonal_(-math.inf)
            out = in_buffer(second_buffer, *s.shape)
            for span, dim in ((tile.rows, 1), (tile.mirror, 0)):
                if span is None:
                    continue
                torch.maximum(hardest[span], s.amax(dim), out=hardest[span])
                p = positive[span].unsqueeze(dim)
                if terms.relative or dim == 1:  # else both sides of a pair have the same term
                    terms.negative(s, p, out)
                value[span] += out.sum(dim)
                if terms.relative:
                    slope[span] += terms.slope(s, p, out).sum(dim)
    share = _share(place)
    return Scan(value * share, slope * share, hardest, (positive,))


def gradient(
    rows: Tensor,
    summary: tuple[Tensor, ...],
    block: Block,
    start: int,
    place: Place,
    terms: Terms,
    tile_size: int | None = None,
) -> Tensor:
    """See `model.losses.pairs.Selection.gradient`; `start` is not needed."""
    size = tile_size or default_tile_size(rows)
    (row_positive,), ((columns, column_positive), first) = summary, block
    grad = torch.zeros_like(rows)
    buffer, second_buffer = tile_buffer(rows, size), tile_buffer(rows, size)
    for tile in tiles(len(rows), len(columns), first, size):
        s = similarity(rows, columns, tile, buffer)
        if tile.diagonal != "negative":
            s.fill_diagonal_(-math.inf)
        weights = terms.slope(s, row_positive[tile.rows, None], in_buffer(second_buffer, *s.shape))
        if terms.relative:
            weights += terms.slope(s, column_positive[tile.columns], s)
        else:
            weights *= 2
        grad[tile.rows].addmm_(weights, columns[tile.columns])
        if tile.mirror is not None:
            grad[tile.mirror].addmm_(weights.T, rows[tile.rows])
    return grad.mul_(_share(place))


def _share(place: Place) -> float:
    return 1 / max(place.num_rows - 2, 1)
