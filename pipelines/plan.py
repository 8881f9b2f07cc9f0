"""Which samples a batch holds, and where a loader stands: what all loaders do alike.

A plan is a function of the data, the seed, the epoch and the batch size; ranks take slices of it. It also keeps the
position that a checkpoint stores, with what proves at a resume that the data and the order are the same.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import Beton
from pipelines.order import epoch_order, num_global_batches, rank_rows
from pipelines.subset import rows_checksum

NUM_FINGERPRINTED = 64  # samples that are read when a loader is made


class BatchPlan:
    """The batches of every epoch, for one rank.

    Args:
        num_samples: of the set.
        fingerprint: tells this set apart from others.
        seed: of the order.
        global_batch_size: images over all ranks; divisible by `world_size` when training.
        rank: of this process.
        world_size: number of ranks.
        training: shuffle and drop the last partial global batch; else keep the order and every sample.
        rows: int64, rising: those of the set's rows that are used; None: all.

    Attributes:
        num_samples: that are used.
        rows: those; None: all of the set.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        fingerprint: str,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        training: bool,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.num_samples = num_samples if rows is None else len(rows)
        self.seed, self.training, self.rows = seed, training, rows
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self._identity = {
            "num_samples": num_samples,
            "dataset": fingerprint,
            "seed": seed,
            "global_batch_size": global_batch_size,
            "subset": None
            if rows is None
            else rows_checksum(rows),  # a checkpoint from before subsets has no word of it
        }
        self._position = (0, 0)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return num_global_batches(self.num_samples, self.global_batch_size, drop_last=self.training)

    def samples(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """The rows of the set that this rank takes of a batch, int64 [N]; the caller's own."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.num_samples, shuffle=self.training))
        positions = self._order[1][
            rank_rows(batch, self.global_batch_size, self.num_samples, self.rank, self.world_size)
        ]
        return positions.copy() if self.rows is None else self.rows[positions]

    def record(self, epoch: int, batch: int) -> None:
        """Note that a batch is being handed over: a checkpoint taken from now on goes on with the next one."""
        self._position = (epoch, batch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch recorded, and what makes a resumed run the same one."""
        epoch, next_batch = self._position
        return self._identity | {"epoch": epoch, "next_batch": next_batch}

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that `state` is of this data and order, and return its position: epoch and next batch.

        Raises:
            ValueError: the state is of another dataset, subset, seed or global batch size.
        """
        for name, expected in self._identity.items():
            if state.get(name) != expected:
                raise ValueError(
                    f"the checkpoint was made with `{name}` {state.get(name)}, this run has {expected}; "
                    "resume with the data and batch size that it was started with"
                )
        self._position = (int(state["epoch"]), int(state["next_batch"]))
        return self._position


def plan_of(
    beton: Beton,
    *,
    seed: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    training: bool,
    rows: NDArray[np.int64] | None = None,
) -> BatchPlan:
    """The plan over a `.beton`; arguments as of `BatchPlan`."""
    return BatchPlan(
        num_samples=beton.num_samples,
        fingerprint=beton_fingerprint(beton),
        seed=seed,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        training=training,
        rows=rows,
    )


def beton_fingerprint(beton: Beton) -> str:
    """Checksum of the file's tables and of some of its samples: tells two sets apart quickly, wherever they lie."""
    crc = 0
    for table in (beton.modes, beton.widths, beton.heights, beton.sizes, beton.labels):
        crc = zlib.crc32(b"" if table is None else np.ascontiguousarray(table).tobytes(), crc)
    for sample in np.linspace(0, beton.num_samples - 1, NUM_FINGERPRINTED).astype(np.int64).tolist():
        crc = zlib.crc32(beton.encoded(sample).data, crc)
    return f"{crc:08x}"
