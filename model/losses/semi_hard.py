"""One negative of an anchor counts: the semi-hard one, the closest that is farther than the positive.

The walk is in tiles, in torch, on any device, as `model.losses.every_negative`'s. Of negatives at the same distance the
first in the order of all ranks' rows is taken, so that the choice does not depend on the order of the walk.

A row's summary is its choice (where it stands among all ranks' rows, −1 for none) and that one's weight w. With it, the
gradient needs no similarities: each row pulls at its choice and is pulled by those whose choice it is. Those are added
by index, on a GPU in no fixed order.

`model.losses.pairs` says what `scan` and `gradient` take and give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model.exchange import Block
from model.losses.pairs import Place, Scan, Terms
from model.similarity import clearly_below, default_tile_size, in_buffer, similarity, tile_buffer, tiles

NONE = -1


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
    bound = clearly_below(positive)
    closest, hardest = torch.full_like(positive, -math.inf), torch.full_like(positive, -math.inf)
    choice = torch.full_like(positive, NONE, dtype=torch.int64)
    buffer, second_buffer = tile_buffer(rows, size), tile_buffer(rows, size)
    for start, ((columns,), first) in blocks:
        for tile in tiles(len(rows), len(columns), first, size):
            s = similarity(rows, columns, tile, buffer)
            if tile.diagonal != "negative":
                s.fill_diagonal_(-math.inf)
            own = slice(start + tile.columns.start, start + tile.columns.stop)
            for span, others, dim in ((tile.rows, own, 1), (tile.mirror, tile.rows, 0)):
                if span is None:
                    continue
                torch.maximum(hardest[span], s.amax(dim), out=hardest[span])
                farther = in_buffer(second_buffer, *s.shape).copy_(s)
                farther.masked_fill_(s >= bound[span].unsqueeze(dim), -math.inf)  # a NaN stays, to be seen
                here, index = farther.max(dim)
                index += others.start if dim == 1 else place.start + others.start
                _keep_closest_(closest[span], choice[span], here, index)
    found = closest != -math.inf
    value = terms.negative(closest, positive).where(found, 0.0)
    slope = terms.slope(closest, positive).where(found, 0.0)
    return Scan(value, slope, hardest, (choice, slope))


def gradient(rows: Tensor, summary: tuple[Tensor, ...], block: Block, start: int, place: Place, terms: Terms) -> Tensor:
    """See `model.losses.pairs.Selection.gradient`; `terms` is not needed."""
    (choice, slope), (columns, choices, slopes) = summary, block.tensors
    index, weight = _among(choice - start, slope, len(columns))
    grad = columns[index].mul_(weight[:, None])
    index, weight = _among(choices - place.start, slopes, len(rows))
    return grad.index_add_(0, index, columns * weight[:, None])


def _keep_closest_(closest: Tensor, choice: Tensor, here: Tensor, index: Tensor) -> None:
    """Take what is closer, or as close and earlier, into `closest` and `choice`, in place."""
    better = (here > closest) | ((here == closest) & (index < choice))
    choice.copy_(torch.where(better, index, choice))
    torch.maximum(closest, here, out=closest)


def _among(index: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices into `count` rows, and weights that are 0 where an index was outside."""
    inside = (index >= 0) & (index < count)
    return index.clamp(0, count - 1), weight.where(inside, 0.0)
