"""When the lines of a run were written: by the clock, with pauses and resumes.

Where the lines keep no time, as in older runs, by how long their steps took.

Legend: n lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.report_runs import RunRecord
from tools.report_series import FloatArray
from train.metrics import TIME

UNITS = (("s", 1.0, 300.0), ("minutes", 60.0, 3 * 3600.0), ("hours", 3600.0, 4 * 86400.0), ("days", 86400.0, np.inf))
SHORTEST_PAUSE_S = 10.0
SMALLEST_SHARE = 0.01  # of the whole: a shorter pause would not be seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock:
    """The time of every line."""

    seconds: FloatArray
    """Since the run began: float64 [n], rising."""
    trained: FloatArray
    """Of each line, the seconds that its steps took: float64 [n]."""
    is_wall: bool
    """Whether the lines carry the time at which they were written; else `seconds` are those of the steps alone."""
    pauses: Sequence[int]
    """Lines before which nothing was trained for a while, rising."""
    resumed: Sequence[int]
    """Lines that are the first after a resume, rising."""

    @property
    def total_trained(self) -> float:
        """Seconds of all steps."""
        return float(self.trained.sum())

    @property
    def total(self) -> float:
        """Seconds from the first step to the last line."""
        return float(self.seconds[-1]) if len(self.seconds) else 0.0

    def pause_seconds(self, line: int) -> float:
        """How long nothing was trained before a line."""
        return float(self.seconds[line] - self.seconds[line - 1] - self.trained[line])


def clock_of(run: RunRecord) -> Clock:
    """The clock of a run."""
    step = run.lines.step
    rate, time = run.lines.column("images_per_sec"), run.lines.column(TIME)
    images = np.diff(step, prepend=0.0).clip(min=0.0) * run.global_batch_size
    known = np.isfinite(rate) & (rate > 0.0)
    trained = np.where(known, images / np.where(known, rate, 1.0), 0.0)
    resumed = [int(np.searchsorted(step, done, side="right")) for done in run.resumed_steps]
    resumed = [line for line in resumed if line < len(step)]
    if len(step) == 0 or not np.isfinite(time).all():
        return Clock(seconds=np.cumsum(trained), trained=trained, is_wall=False, pauses=[], resumed=resumed)
    seconds = np.maximum.accumulate(time - time[0] + trained[0])  # a clock may be set back
    idle = np.diff(seconds, prepend=0.0) - trained
    threshold = max(SHORTEST_PAUSE_S, SMALLEST_SHARE * float(seconds[-1]))
    pauses = [int(line) for line in np.flatnonzero(idle > threshold) if line > 0]
    return Clock(seconds=seconds, trained=trained, is_wall=True, pauses=pauses, resumed=resumed)


def unit_for(clocks: Sequence[Clock]) -> tuple[str, float]:
    """The unit in which the longest of some runs is read, and its seconds."""
    longest = max((clock.total for clock in clocks), default=0.0)
    return next((name, seconds) for name, seconds, most in UNITS if longest <= most)
