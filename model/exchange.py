"""How a loss over the global batch meets the rows of the other ranks: all at once, or block by block.

`all_gather` holds the rows of all ranks: one collective, memory O(W·R·D) on every rank. `ring` holds two blocks of R
rows: the one at hand and the one on its way; each rank hands its block on W − 1 times, while it computes on what it
has. All ranks must walk the same blocks in step.

Shapes: R rows on this rank (equal on all ranks), W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives

Exchange = Literal["all_gather", "ring"]


class Block(NamedTuple):
    """Rows of one rank, or of all."""

    tensors: tuple[Tensor, ...]
    """What was exchanged, each `[C, …]`: C = W·R rows in rank order, or R rows of one rank."""
    first: int | None
    """Where this rank's own R rows start among them; None if they are not there."""


def gathered(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> Block:
    """The rows of all ranks `[W·R, …]` as one block; an all-gather for each tensor."""
    columns = tuple(collectives.all_gather_rows(tensor, group) for tensor in tensors)
    return Block(columns, collectives.rank(group) * len(tensors[0]))


def ring(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> Iterator[Block]:
    """This rank's own rows, then those of the W − 1 others, one block after the other.

    A block is on its way while the caller works on the one before it. Blocks are read-only.
    """
    ranks, rank = collectives.world_size(group), collectives.rank(group)
    current = tuple(tensor.contiguous() for tensor in tensors)
    for turn in range(ranks):
        last = turn == ranks - 1
        coming = () if last else tuple(torch.empty_like(tensor) for tensor in current)
        transfers = [] if last else _pass_on(current, coming, rank, ranks, group)
        yield Block(current, 0 if turn == 0 else None)
        for transfer in transfers:
            transfer.wait()
        current = coming


def block_starts(num_rows: int, exchange: Exchange, group: dist.ProcessGroup | None) -> list[int]:
    """Where the rows of each block start among all ranks' rows, block by block as they come."""
    if exchange == "all_gather":
        return [0]
    ranks, rank = collectives.world_size(group), collectives.rank(group)
    return [(rank - turn) % ranks * num_rows for turn in range(ranks)]


def check_exchange(exchange: str) -> None:
    """Refuse a name that is none.

    Raises:
        ValueError: as said.
    """
    if exchange not in get_args(Exchange):
        raise ValueError(f"`exchange` must be 'all_gather' or 'ring', got {exchange!r}")


def _pass_on(
    current: tuple[Tensor, ...],
    coming: tuple[Tensor, ...],
    rank: int,
    ranks: int,
    group: dist.ProcessGroup | None,
) -> list[dist.Work]:
    """Start sending `current` to the next rank and receiving `coming` from the one before."""
    following, preceding = ((rank + step) % ranks for step in (1, -1))
    operations = [
        dist.P2POp(operation, tensor, group=group, group_peer=peer)
        for operation, tensors, peer in ((dist.isend, current, following), (dist.irecv, coming, preceding))
        for tensor in tensors
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(operations)
    return works
