"""What a person sees of a run: on rank 0's stderr a line that tells how far it is, and above it the warnings.

    epoch 4/100  step 1,240/39,000  loss 4.812  2,310 images/s  data-wait 0.4 %  ETA 3 h 12 min

On a terminal the line is rewritten in place. In a file or a pipe, such as a Slurm job's log, it is a plain line at most
every `INTERVAL_S` seconds, and always the first and the last: no carriage returns, no control codes.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

logger = logging.getLogger(__name__)

SETTLING_S = 120.0  # the rate behind the ETA forgets what is older than a few times this
INTERVAL_S = 30.0  # between two lines in a file
REDRAW_S = 0.1  # on a terminal, no more often
DEFAULT_COLUMNS = 80  # where a terminal does not know its width

# Fields in the order in which they are left out where the terminal is too narrow for all.
LEAST_IMPORTANT_FIRST = ("data_wait", "knn_accuracy", "probe_accuracy", "images_per_sec", "epoch", "eta", "loss")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Steps and the seconds that they took, both discounted by age."""

    steps: float = 0.0
    seconds: float = 0.0

    def then(self, steps: int, seconds: float) -> Pace:
        """The pace after `steps` more, which took `seconds`: what was before weighs e^(−seconds / SETTLING_S).

        So the first stretch of a process counts in full at once, and after a change of side the old rate is forgotten
        in minutes.
        """
        weight = math.exp(-seconds / SETTLING_S)
        return Pace(steps=weight * self.steps + steps, seconds=weight * self.seconds + seconds)

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps take at this pace; None where none was seen yet."""
        return self.seconds / self.steps * steps_left if self.steps > 0 else None


def duration(seconds: float) -> str:
    """Seconds as a person says them, in two units at most: `45 s`, `12 min`, `3 h 12 min`, `6 d 4 h`."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def progress_line(
    *,
    epoch: int,
    num_epochs: int,
    step: int,
    total_steps: int,
    metrics: Mapping[str, float],
    eta_s: float | None,
    columns: int | None = None,
) -> str:
    """The line, shortened to `columns` characters.

    Args:
        epoch: from 0; shown from 1.
        num_epochs: of the run.
        step: finished ones.
        total_steps: of the run.
        metrics: `loss`, `images_per_sec`, `data_wait` (a share), `probe_accuracy` and `knn_accuracy` (shares) are shown
            where they are given.
        eta_s: seconds to the end, before it; None: not known yet.
        columns: of the terminal; None: as long as it is.
    """
    fields = {"epoch": f"epoch {epoch + 1}/{num_epochs}", "step": f"step {step:,}/{total_steps:,}"}
    for name, form in (
        ("loss", "loss {:.3f}"),
        ("images_per_sec", "{:,.0f} images/s" if metrics.get("images_per_sec", 0.0) >= 10.0 else "{:.1f} images/s"),
        ("data_wait", "data-wait {:.1%}"),
        ("probe_accuracy", "probe {:.1%}"),
        ("knn_accuracy", "kNN {:.1%}"),
    ):
        if name in metrics:
            fields[name] = form.format(metrics[name]).replace("%", " %")
    if step >= total_steps:
        fields["eta"] = "done"
    elif eta_s is not None:
        fields["eta"] = f"ETA {duration(eta_s)}"
    line = "  ".join(fields.values())
    if columns is None:
        return line
    for name in LEAST_IMPORTANT_FIRST:
        if len(line) > columns:
            fields.pop(name, None)
            line = "  ".join(fields.values())
    return line[: max(columns, 0)]


class Console(logging.Handler):
    """The stderr of a process: log records as lines of their own, and below them the line of progress.

    Each leaves the other's lines whole. A stream that cannot be written to any more, as after its terminal has gone, is
    left alone from then on, which the log file tells: a run does not end for it.

    Args:
        enabled: False on all ranks but one; then nothing is written.
        stream: default: stderr.
        interval_s: between two lines of progress where the stream is no terminal.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None, interval_s: float = INTERVAL_S) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._interval_s = REDRAW_S if self._is_terminal else interval_s
        self._enabled = enabled
        self._shown = ""  # what stands in the terminal's last line
        self.start(num_epochs=0, total_steps=0)

    def start(self, *, num_epochs: int, total_steps: int) -> Console:
        """Say how long the run is, before the first `write`. `with console.start(...):` ends the line at the end."""
        self._num_epochs, self._total_steps = num_epochs, total_steps
        self._pace = Pace()
        self._step, self._time = -1, 0.0  # of the last `write`
        self._seen: dict[str, float] = {}  # the newest value of each metric, since some come once an epoch
        self._withheld = ""  # the newest line, where it came too soon to be shown
        self._next_time = 0.0
        return self

    def write(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Show how far the run is.

        Args:
            epoch: that the step was in, from 0.
            step: finished ones, since the beginning of the run.
            metrics: see `progress_line`; one that is not given keeps the value that it had.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        if step > self._step >= 0:  # what comes before the first line is not timed: it compiles kernels
            self._pace = self._pace.then(step - self._step, now - self._time)
        self._step, self._time = step, now
        self._seen |= metrics
        self._withheld = progress_line(
            epoch=epoch,
            num_epochs=self._num_epochs,
            step=step,
            total_steps=self._total_steps,
            metrics=self._seen,
            eta_s=self._pace.eta_s(self._total_steps - step),
            columns=self._columns(),
        )
        if now >= self._next_time or step >= self._total_steps:
            self._next_time = now + self._interval_s
            self._show()

    def emit(self, record: logging.LogRecord) -> None:
        """A log record as a line of its own, above the line of progress."""
        wiped = "\r" + " " * len(self._shown) + "\r" if self._shown else ""
        self._put(f"{wiped}{self.format(record)}\n{self._shown}")

    def finish(self) -> None:
        """Show the newest line, if it was withheld, and leave the cursor on a line of its own."""
        self._show()
        assert self.lock is not None
        with self.lock:
            if self._shown:
                self._put("\n")
            self._shown = ""

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _show(self) -> None:
        line, self._withheld = self._withheld, ""
        assert self.lock is not None
        with self.lock:  # records can come from other threads
            if line and self._is_terminal:
                self._put("\r" + line.ljust(len(self._shown)))
                self._shown = line
            elif line:
                self._put(line + "\n")

    def _put(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._enabled = False
            logger.warning("the console cannot be written to any more (%s); the run goes on without it", error)

    def _columns(self) -> int | None:
        """Of the terminal, less the one in which its cursor stands; None where there is no terminal."""
        if not self._is_terminal:
            return None
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        return (columns or DEFAULT_COLUMNS) - 1
