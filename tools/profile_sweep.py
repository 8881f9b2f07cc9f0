"""Loader × batch × decoding threads, each measured as in a run for a moment: which combination is the fastest here.

A combination that cannot be is named with its reason; one that time did not suffice for, too. Another batch changes
what is learned, another loader nearly nothing; the table tells rates alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.profile_rig import IMPOSSIBLE, Rig, changed, of_rank_zero
from train.config import PretrainConfig
from train.runtime import Ranks, cores_per_rank

OUT_OF_TIME = "not tried: the time was over"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination."""

    loader: str
    num_threads: int
    global_batch_size: int
    is_now: bool
    """Whether it is the configuration's own."""
    images_per_sec: float | None = None
    data_wait: float | None = None
    reason: str | None = None
    """Why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sweep(config: PretrainConfig, ranks: Ranks, *, seconds: float, total_seconds: float) -> list[Cell]:
    """Measure the combinations, the configuration's own first. All ranks must call.

    Args:
        config: the run's.
        ranks: of this process.
        seconds: of one combination, beside its start.
        total_seconds: after which no other is begun.

    Returns:
        All combinations, those that were measured with their rates.
    """
    ends = time.monotonic() + total_seconds
    cells = grid(config, cores_per_rank(ranks))
    by_batch = itertools.groupby(cells, lambda cell: cell.global_batch_size)
    return [
        measured
        for _, same in by_batch
        for measured in _sweep_batch(config, list(same), ranks, seconds=seconds, ends=ends)
    ]


def best_of(cells: Sequence[Cell]) -> Cell | None:
    """The fastest that was measured."""
    measured = [cell for cell in cells if cell.images_per_sec is not None]
    return max(measured, key=lambda cell: cell.images_per_sec or 0.0, default=None)


def grid(config: PretrainConfig, num_cores: int) -> list[Cell]:
    """The combinations: the same batch, twice and half of it; every loader; all cores, half of them, one."""
    data = config.data
    now = (data.loader, data.num_threads or num_cores, data.global_batch_size)
    loaders = ["folder"] if Path(data.path).is_dir() else ["ffcv", "dali", "resident"]
    threads = sorted({1, max(1, num_cores // 2), num_cores, now[1]}, reverse=True)
    batches = [now[2], 2 * now[2], *([now[2] // 2] if now[2] >= 4 else [])]
    combinations = [
        (loader, num, size)
        for size in batches
        for loader in sorted(loaders, key=lambda loader: loader != now[0])
        for num in sorted(threads, key=lambda num: num != now[1])
        if loader != "resident" or num == now[1]  # which has no threads while it runs
    ]
    return [
        Cell(loader=loader, num_threads=num, global_batch_size=size, is_now=(loader, num, size) == now)
        for loader, num, size in combinations
    ]


def _sweep_batch(
    config: PretrainConfig, cells: list[Cell], ranks: Ranks, *, seconds: float, ends: float
) -> Iterator[Cell]:
    """The cells of one batch size, which have one engine."""
    with ExitStack() as stack:
        first: Rig | None = None
        for cell in cells:
            if not of_rank_zero(time.monotonic() < ends, ranks):
                yield replace(cell, reason=OUT_OF_TIME)
                continue
            try:
                rig = Rig(_configuration(config, cell), ranks, like=first)
                if first is None:
                    first = rig
                    stack.callback(rig.close)
                with ExitStack() as own:
                    own.callback(rig.stop_loading)
                    turn = rig.turn(seconds)
            except IMPOSSIBLE as error:
                yield replace(cell, reason=" ".join(str(error).split()))
            else:
                yield replace(cell, images_per_sec=turn.images_per_sec, data_wait=turn.data_wait)


def _configuration(config: PretrainConfig, cell: Cell) -> PretrainConfig:
    """The run's with a cell's values, and without options that belong to another loader."""
    change: dict[str, Any] = {
        "data.loader": cell.loader,
        "data.num_threads": cell.num_threads,
        "data.global_batch_size": cell.global_batch_size,
    }
    if cell.loader != "ffcv":
        change["data.geometry"] = "auto"
    if cell.loader != "dali":
        change["data.photometric"] = "ours"
    return changed(config, change)
