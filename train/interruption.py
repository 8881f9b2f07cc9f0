"""Asked from outside to stop: all ranks stop after the same step, with a checkpoint, and the same command goes on.

SIGTERM and SIGUSR1 (what schedulers send some time before they end a job) and SIGINT (Ctrl-C) ask for it. A signal may
reach one rank alone, or ranks at different steps; so after every step the ranks tell each other, by an all-reduce of
one number in a gloo group of its own, which runs during the next step and is read after it. Nothing waits for a GPU.
"""

from __future__ import annotations

import signal
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from train.cli import EXIT_INTERRUPTED, EXIT_RESUMABLE, RunInterrupted
from train.runtime import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption:
    """Takes the signals of a process, in which one run or several follow one another; a context manager.

    Until `begin`, signals do what they always do: there is nothing to lose yet, and a process that waits for the others
    inside compiled code would not hear of them. From then on a signal is a wish, which `agreed` tells; a second Ctrl-C
    does not wait for it.
    """

    def __init__(self) -> None:
        self._earlier: dict[int, Any] = {}
        self._signal = 0  # the one that came, of this rank
        self._group: Any = None  # `new_group` may give a mark in place of a group
        self._heard: tuple[torch.Tensor, dist.Work] | None = None

    def begin(self, ranks: Ranks, timeout: timedelta | None = None) -> None:
        """From now on there is something to save. All ranks must call.

        Args:
            ranks: of this process.
            timeout: how long they wait for one another; None: torch's default.
        """
        if ranks.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        if not self._earlier:  # else an earlier run of this process began it
            self._earlier = {number: signal.signal(number, self._take) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # who started this process may have blocked them

    def agreed(self) -> int:
        """The signal that some rank has met, or 0: the same on all ranks. All ranks must call, after each step."""
        if self._group is None:
            return self._signal
        heard = 0
        if self._heard is not None:
            number, work = self._heard
            work.wait()
            heard = int(number)
        number = torch.tensor(self._signal)
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._heard = (number, work)
        return heard

    def conclude(self) -> None:
        """After the last step: wait for what the ranks still tell each other. All ranks must call."""
        if self._heard is not None:
            self._heard[1].wait()
            self._heard = None

    def __enter__(self) -> Interruption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            # Who was asked to stop, stops: the same wish again, while it leaves, changes nothing.
            signal.signal(number, signal.SIG_IGN if self._signal else handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


def stopped(number: int, step: int) -> RunInterrupted:
    """What ends a run that has been asked to stop, and has saved a checkpoint after `step` steps."""
    return RunInterrupted(
        f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint; the same command goes on",
        alike=True,
        code=EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE,
    )
