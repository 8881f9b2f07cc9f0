"""The parts of a training step, the whole of it, and the step with its loader.

The step is the run's own: its engine, its method, its moving average, with a learning rate of 0, which costs what any
other does and leaves the weights as they are. It is fed from memory. A `StepClock` listens to the stretches that the
engine names (`train.stages`); each moment of a step belongs to the innermost of them, so the parts add up to the step.
On a GPU the moments are events on its stream, which nobody waits for before the end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from model.ema import WeightAverage
from model.methods.base import Method
from pipelines.batch import Batch
from train.engine import Engine
from train.stages import listening, stage

PARTS = ("forward", "loss", "backward", "communication", "optimizer")
REST = "optimizer"  # what lies between the stretches: bookkeeping around the update
MIN_STEPS, MAX_STEPS = 2, 200
TURNS = 4  # with the clock and without, one after the other, so that what else the machine does falls on both


class StepClock:
    """Adds up the seconds that a device spends in each stretch, without those of the stretches within it.

    Args:
        device: whose time counts.
        clock: of the host, for what is no GPU; seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu, self._clock = device.type == "cuda", clock
        self._stack: list[str] = []
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        """Moments, and what each begins."""

    def begin(self, name: str) -> None:
        """See `train.stages.Listener`."""
        self._stack.append(name)
        self._mark()

    def end(self, name: str) -> None:
        """See `train.stages.Listener`."""
        self._stack.pop()
        self._mark()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, in which nothing is left out."""
        self._mark()
        try:
            yield
        finally:
            self._marks.append(("", self._now()))

    def seconds(self) -> list[dict[str, float]]:
        """Of each step since the last call, by part; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        steps: list[dict[str, float]] = [dict.fromkeys(PARTS, 0.0)]
        for (name, begin), (_, end) in pairwise(marks):
            if name:
                steps[-1][name if name in PARTS else REST] += _elapsed(begin, end)
            else:  # between two steps
                steps.append(dict.fromkeys(PARTS, 0.0))
        return steps

    def _mark(self) -> None:
        self._marks.append((self._stack[-1] if self._stack else REST, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        return _event() if self._on_gpu else self._clock()


@dataclass
class Stepper:
    """Takes training steps as the run does.

    Attributes:
        engine: of the run.
        method: that it trains.
        device: of this rank.
        average: the moving average of the weights, where the run keeps one.
        clock: of the host, by which steps are timed on a CPU; seconds.
        steps: that were taken.
    """

    engine: Engine
    method: Method
    device: torch.device
    average: WeightAverage | None = None
    clock: Callable[[], float] = time.perf_counter
    steps: int = field(default=0)

    def take(self, batch: Batch) -> None:
        """One step. All ranks must call."""
        self.steps += 1
        self.engine.train_step(batch.views, batch.labels, lr=0.0, step=self.steps)
        with stage("optimizer"):
            self.method.after_step(self.steps, self.engine.left_out)
            if self.average is not None:
                self.average.update(self.engine.left_out)

    def number_of_steps(self, batch: Batch, seconds: float) -> int:
        """Steps that fill so many seconds, the same on all ranks, which must all call; warms up first."""
        self.take(batch)  # allocates, and may compile
        took = self.time_of([batch])[0]
        slowest = slowest_rank([took], self.device)[0]
        return max(MIN_STEPS, min(MAX_STEPS, round(seconds / max(slowest, 1e-9))))

    def measure(
        self, batches: list[Batch], num_steps: int, patience_s: float = math.inf
    ) -> tuple[list[float], list[dict[str, float]]]:
        """Seconds of so many steps with batches that lie in memory, and of the parts of as many; all ranks must call.

        Where they take longer than `patience_s`, as on a machine that has become busy, fewer are measured.
        """
        begun = time.monotonic()
        fed = [batches[i % len(batches)] for i in range(num_steps)]
        turn = -(-num_steps // TURNS)
        whole: list[float] = []
        parts: list[dict[str, float]] = []
        for begin in range(0, num_steps, turn):
            whole += self.time_of(fed[begin : begin + turn])
            parts += self.parts_of(fed[begin : begin + turn])
            if slowest_rank([time.monotonic() - begun], self.device)[0] > patience_s:
                break
        return whole, parts

    def time_of(self, batches: list[Batch]) -> list[float]:
        """Seconds of a step with each of these batches, which lie in memory. All ranks must call."""
        moments = [self._now()]
        for batch in batches:
            self.take(batch)
            moments.append(self._now())
        self._finish()
        return [_elapsed(begin, end) for begin, end in pairwise(moments)]

    def parts_of(self, batches: list[Batch]) -> list[dict[str, float]]:
        """Seconds of the parts of a step with each of these batches. All ranks must call."""
        clock = StepClock(self.device, self.clock)
        self._finish()
        with listening(clock):
            for batch in batches:
                with clock.step():
                    self.take(batch)
        return clock.seconds()

    def together(self, batches: Iterator[Batch], num_steps: int) -> tuple[float, float]:
        """Seconds of a step whose batch comes from the loader, and how many of them it waited for the batch.

        All ranks must call. On a GPU the wait is what passes between a step and the next, the loader's own work there
        included.
        """
        self.take(next(batches))
        self._finish()
        moments = [self._now()]
        for _ in range(num_steps):
            batch = next(batches)
            moments.append(self._now())
            self.take(batch)
            moments.append(self._now())
            del batch
        self._finish()
        waited = sum(_elapsed(asked, came) for asked, came in zip(moments[0:-1:2], moments[1::2], strict=True))
        return _elapsed(moments[0], moments[-1]) / num_steps, waited / num_steps

    def _now(self) -> float | torch.cuda.Event:
        return _event() if self.device.type == "cuda" else self.clock()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.engine.barrier()


def steps_in(seconds: float, taken: list[float], device: torch.device, *, most: int) -> int:
    """How many steps fill so many seconds, by those that were taken, the same on all ranks, which must all call."""
    each = slowest_rank([statistics.median(taken)], device)[0]
    return max(MIN_STEPS, min(most, round(seconds / max(each, 1e-9))))


def slowest_rank(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over the ranks, which must all call."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def _event() -> torch.cuda.Event:
    """Recorded on the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elapsed(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds from one moment to the other; the device has passed both."""
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return float(begin.elapsed_time(end)) / 1e3
