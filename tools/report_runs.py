"""What a run directory tells, however much of it is there: configuration, metrics, position, versions, starts.

`metrics.jsonl` may be torn, the configuration of another version, the checkpoint gone or damaged: whatever cannot be
read is left out, and `problems` says so.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tools.report_series import FloatArray
from train.checkpoint import latest_checkpoint, read_sections
from train.config import PretrainConfig, config_from_dict, flatten, read_run_config
from train.metrics import METRICS_FILE, parse_line
from train.run_lock import LOCK_FILE

STARTS_FILE = "starts.jsonl"
LOG_FILE = "train.log"
RESUMED = re.compile(r"resuming from \S*step-(\d+)\.safetensors")
RANKS = re.compile(r" on (\d+) ranks of \d+ images")
MAX_LOG_BYTES = 2**26

Curve = tuple[FloatArray, FloatArray]
"""Numbers of lines, and the values there: each float64 [n]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """`metrics.jsonl` by columns."""

    step: FloatArray
    """Of each line, float64 [n]."""
    columns: Mapping[str, tuple[FloatArray, FloatArray]]
    """By metric: the numbers of the lines that have it, and its values there."""
    num_torn: int
    """Lines that are no whole record."""

    def column(self, name: str) -> FloatArray:
        """A metric on every line, NaN where a line lacks it: float64 [n]."""
        values = np.full(len(self.step), math.nan)
        if name in self.columns:
            rows, found = self.columns[name]
            values[rows.astype(np.int64)] = found
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """One run."""

    path: Path
    label: str
    """What tells it from the others of a report."""
    stored: Mapping[str, Any]
    """Its configuration as the file has it, flat."""
    config: PretrainConfig | None
    """The same; None where it is of another version."""
    lines: Lines
    checkpoint: Path | None
    sections: Mapping[str, Mapping[str, Any]]
    """What the newest checkpoint says beside its tensors; empty without one."""
    starts: Sequence[Mapping[str, Any]]
    """As the run recorded them, first to last; empty where it did not."""
    log: str
    """Of rank 0."""
    is_running: bool
    problems: Sequence[str]

    @property
    def global_batch_size(self) -> int:
        """Images of a step; 0 where it is unknown."""
        size = self.stored.get("data.global_batch_size")
        return size if isinstance(size, int) and size > 0 else 0

    @property
    def has_head(self) -> bool:
        """Whether it trains a projection head, as pretraining does; else a classifier, for an evaluation."""
        return self.stored.get("model.method", "simclr") not in ("supervised", "distill")

    @property
    def step(self) -> int:
        """Steps that are done, as far as metrics or the checkpoint tell."""
        by_metrics = int(self.lines.step[-1]) if len(self.lines.step) else 0
        return max(by_metrics, self.saved_step)

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        step = self.sections.get("position", {}).get("step")
        return step if isinstance(step, int) else 0

    @property
    def steps_per_epoch(self) -> int | None:
        """Worked out from where the newest checkpoint stands."""
        position, loader = self.sections.get("position", {}), self.sections.get("loader", {})
        epoch, done = loader.get("epoch"), loader.get("next_batch")
        if not isinstance(epoch, int) or not isinstance(done, int):
            return None
        if epoch > 0 and (self.saved_step - done) % epoch == 0:
            return (self.saved_step - done) // epoch or None
        return done or None if position.get("epoch_ended") else None

    @property
    def total_steps(self) -> int | None:
        """Of the whole run."""
        epochs = self.stored.get("train.epochs")
        if self.steps_per_epoch is None or not isinstance(epochs, int):
            return None
        return epochs * self.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """Whether its last step is saved, or its log says so."""
        if self.total_steps:
            return self.saved_step >= self.total_steps
        return bool(re.search(rf"train\.loop: done: {self.step} steps\s*$", self.log)) and self.step > 0

    @property
    def world_size(self) -> int | None:
        """Ranks of the last start."""
        if self.starts and isinstance(found := self.starts[-1].get("world_size"), int):
            return found
        ranks = RANKS.findall(self.log)
        return int(ranks[-1]) if ranks else None

    @cached_property
    def resumed_steps(self) -> list[int]:
        """After how many steps the run was taken up again, rising; each once."""
        steps = {int(step) for step in RESUMED.findall(self.log)}
        steps |= {start["step"] for start in self.starts if isinstance(start.get("step"), int)}
        return sorted(step for step in steps if step > 0)


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs of some directories.

    Raises:
        ValueError: a directory holds no run, or is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"RUN must name each run once, got {paths[i]} twice")
    names = [path.name for path in resolved]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def read_run(path: Path, label: str) -> RunRecord:
    """A run.

    Raises:
        ValueError: the directory holds none.
    """
    resolved, problems = read_run_config(path), list[str]()
    config = None
    try:
        config = config_from_dict(resolved)
    except ValueError as error:
        problems.append(f"Its configuration is of another version of Twinview: {_line(error)}")
    lines = read_lines(path / METRICS_FILE)
    if lines.num_torn:
        problems.append(f"{lines.num_torn:,} lines of {METRICS_FILE} are no whole records, and left out.")
    checkpoint, sections = latest_checkpoint(path), {}
    if checkpoint is not None:
        try:
            sections = read_sections(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(_line(error))
    return RunRecord(
        path=path,
        label=label,
        stored=flatten(resolved),
        config=config,
        lines=lines,
        checkpoint=checkpoint,
        sections=sections,
        starts=read_starts(path / STARTS_FILE),
        log=_read_text(path / LOG_FILE),
        is_running=is_locked(path / LOCK_FILE),
        problems=problems,
    )


def read_lines(path: Path) -> Lines:
    """`metrics.jsonl` line by line: a file of a million lines takes the memory of its numbers alone."""
    steps, num_torn = array("d"), 0
    columns: dict[str, tuple[array[float], array[float]]] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                record = parse_line(line)
                if record is None or abs(record["step"]) > 2**53:
                    num_torn += bool(line.strip())
                    continue
                for name, value in record.items():
                    if name != "step":
                        rows, values = columns.setdefault(name, (array("d"), array("d")))
                        rows.append(len(steps))
                        values.append(value)
                steps.append(record["step"])
    return Lines(
        step=np.array(steps),
        columns={name: (np.array(rows), np.array(values)) for name, (rows, values) in columns.items()},
        num_torn=num_torn,
    )


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that a run recorded: one JSON object a line, of which what is damaged is left out."""
    found = []
    for line in _read_text(path).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def is_locked(path: Path) -> bool:
    """Whether a process of this machine trains into the directory now."""
    try:
        with path.open("r") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system that cannot lock
        return False
    return False


def _read_text(path: Path) -> str:
    """Of a log, its end where it is long; nothing where it is not there."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
        return file.read().decode("utf-8", "replace")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
