"""What the ranks tell each other of where they stand, beside the collectives, which say nothing when one goes missing.

A thread of each rank writes a line into the key-value store of the process group (torch's TCPStore) about once a second
and reads those of the others. Its connection is its own: a call that waits for the store delays nobody but this thread.
Who has stopped, or whose host is gone, no longer writes; who is busy or stuck still does, since the thread lives on.
Rank 0 keeps the store, unless the launcher does: with it, everyone falls silent.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from train.runtime import Ranks

logger = logging.getLogger(__name__)

RANKS_A_SECOND = 64  # at most so many ranks write and read all others within a second: one thread serves them all


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands, in its own words."""

    step: int
    """Steps that the loop counts."""
    phase: int
    """What it has begun since that count was reached: ranks do the same things in the same order."""
    doing: str
    """What that is."""
    seconds: float
    """Since it began that."""
    left: str = ""
    """Why it is no longer there; empty: it is."""
    resumable: bool = True
    """Whether it left for a reason that the same command overcomes."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What was last heard of a rank."""

    standing: Standing
    number: int
    """Of the message; a number seen before is no news."""
    heard_at: float
    """`time.monotonic()` of this process."""


def seconds_between(world_size: int, most: float) -> float:
    """Seconds between two messages of a rank: one, or fewer if `most` is less, and more where many share the store."""
    return min(1.0, most) * max(1.0, world_size / RANKS_A_SECOND)


class Heartbeats:
    """This rank's messages to the others, and theirs. All ranks must start one after the process group.

    Args:
        ranks: of this process.
        seconds: between two messages.
        standing: what to say; called in the thread.

    Attributes:
        news: `{rank: what was last heard}` of those others that were heard of at all.
        answered_at: `time.monotonic()` of when the store last answered.
        store_lost: there is no connection to the store any more.
    """

    def __init__(self, ranks: Ranks, seconds: float, standing: Callable[[], Standing]) -> None:
        self.news: dict[int, News] = {}
        self.answered_at = self._started_at = time.monotonic()
        self.store_lost = False
        self._ranks, self._seconds, self._standing = ranks, seconds, standing
        self._unknown = set(range(ranks.world_size)) - {ranks.rank}
        self._number = 0
        self._ended = threading.Event()
        self._store = _get_default_store().clone()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def silent(self, seconds: float) -> list[int]:
        """The ranks that should be there and were not heard of for so long; those never heard of among them."""
        latest = time.monotonic() - seconds
        heard_at = dict.fromkeys(range(self._ranks.world_size), self._started_at)
        heard_at |= {rank: math.inf if news.standing.left else news.heard_at for rank, news in self.news.items()}
        return [rank for rank, at in heard_at.items() if rank != self._ranks.rank and at < latest]

    def close(self, patience_s: float) -> None:
        """Say the last words and end the thread, unless the store keeps it waiting for longer than `patience_s`."""
        self._ended.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        try:
            self._write()
            while not self._ended.wait(self._seconds):
                self._write()
                self._read()
                self.answered_at = time.monotonic()
            self._write()
        except RuntimeError as error:  # torch's own descend from it
            self.store_lost = True
            logger.info("no more news of the other ranks: %s", " ".join(str(error).split()))

    def _write(self) -> None:
        self._number += 1
        message = asdict(self._standing()) | {"number": self._number}
        self._store.set(_key(self._ranks.rank), json.dumps(message))

    def _read(self) -> None:
        self._unknown -= {rank for rank in self._unknown if self._store.check([_key(rank)])}
        known = [
            rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank and rank not in self._unknown
        ]
        messages = self._store.multi_get([_key(rank) for rank in known]) if known else []
        now = time.monotonic()
        for rank, message in zip(known, messages, strict=True):
            values: dict[str, Any] = json.loads(message)
            number = values.pop("number")
            if rank not in self.news or self.news[rank].number != number:
                self.news[rank] = News(standing=Standing(**values), number=number, heard_at=now)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the ranks could not reach each other."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(name in str(seen) for name in ("gloo", "NCCL", "nccl")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
