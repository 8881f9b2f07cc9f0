"""The order of an epoch: one permutation of the whole set, cut into global batches, sliced by rank.

The permutation depends on `(seed, epoch)` alone. Global batch b is rows [b·G, (b+1)·G) of it and a rank takes its
contiguous slice, so the batches are the same on any number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.rng import bits, key_of

_ORDER = 0x6F72646572  # "order": keeps these keys apart from those of the views


def epoch_order(seed: int, epoch: int, num_samples: int, *, shuffle: bool = True) -> NDArray[np.int64]:
    """All sample indices, int64 [num_samples], in the order in which `epoch` visits them.

    Shuffled by sorting on one 64-bit random key a sample (ties, 2**-64 a pair, keep their order).
    """
    rows = np.arange(num_samples, dtype=np.int64)
    if not shuffle:
        return rows
    return np.argsort(bits(key_of(seed, epoch, _ORDER), rows.astype(np.uint64)), kind="stable").astype(np.int64)


def num_global_batches(num_samples: int, global_batch_size: int, *, drop_last: bool) -> int:
    """Global batches in an epoch: training drops the last partial one, evaluation keeps it."""
    return num_samples // global_batch_size if drop_last else -(-num_samples // global_batch_size)


def rank_rows(batch: int, global_batch_size: int, num_samples: int, rank: int, world_size: int) -> slice:
    """The positions in the epoch's order that `rank` takes of global batch `batch`.

    A partial batch is split as evenly as can be, the first ranks taking one more; a rank may get none.
    """
    start = batch * global_batch_size
    size = min(global_batch_size, num_samples - start)
    share, rest = divmod(size, world_size)
    first = start + rank * share + min(rank, rest)
    return slice(first, first + share + (rank < rest))
