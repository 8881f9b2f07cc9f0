"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard, W&B and MLflow.

`step` counts finished optimizer steps. The files are flushed with every line, and a run that resumes after step s cuts
away what was written beyond s, so that a curve has every point once. JSON has no NaN and no infinities: they are
written as the strings "NaN", "Infinity" and "-Infinity", which `float()` reads back, as `read_metrics` does.

Each line ends with `time`, when it was written, in seconds since 1970: what two runs of one configuration never share.
`read_metrics` leaves it out; `parse_line` gives it.

`metrics.jsonl` is the record; a run stops where it cannot be written. W&B and MLflow are copies: they get every line
once, also those from before they were switched on, and where they fail the run goes on.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from train.cli import UnfitEnvironment
from train.metric_sinks import Sink, TensorBoardSink

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TIME = "time"  # a line's own clock, no metric


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go beside `metrics.jsonl` and TensorBoard."""

    wandb: bool = False
    """Send them to Weights & Biases too (`pip install wandb`, `wandb login`)."""
    wandb_project: str = "twinview"
    """Project at W&B."""
    wandb_entity: str | None = None
    """User or team at W&B; null: the user's default."""
    mlflow: bool = False
    """Send them to MLflow too (`pip install mlflow`, or `mlflow-skinny` for a server elsewhere)."""
    mlflow_uri: str | None = None
    """Of the tracking server or store; null: the environment's MLFLOW_TRACKING_URI, or MLflow's default."""
    mlflow_experiment: str = "twinview"
    """Experiment at MLflow; made if it is missing."""

    def __post_init__(self) -> None:
        for name in ("wandb_project", "mlflow_experiment"):
            if not getattr(self, name).strip():
                raise ValueError(f"`log.{name}` must not be empty")


def check_sinks(config: LogConfig) -> None:
    """Refuse a tracker that cannot begin here; for the rank that writes metrics.

    Raises:
        UnfitEnvironment: its package is not installed, or nobody is logged in.
    """
    for name, wanted, package in (
        ("wandb", config.wandb, "wandb"),
        ("mlflow", config.mlflow, "mlflow (or mlflow-skinny)"),
    ):
        if wanted and not _is_installed(name):
            raise UnfitEnvironment(f"`log.{name}` needs the package {package}, which is not installed; pip install it")
    if config.wandb:
        from train.metric_sinks_wandb import check_wandb

        check_wandb()


def _is_installed(module: str) -> bool:
    """A folder of that name, such as the one in which W&B keeps its runs, is no package."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


class MetricsWriter:
    """Appends metrics to a run directory, and sends them on; a context manager.

    Args:
        run_dir: folder of `metrics.jsonl` and `events.*`; made if it is missing.
        enabled: False on all ranks but one; then nothing is made, read, written or sent.
        resume_step: steps that the run has already done; later lines of earlier processes are cut away.
        config: which trackers get them.
        run_name: as trackers show it; default: the folder's.
        resolved: the run's configuration in plain values, for TensorBoard and the trackers.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool = True,
        resume_step: int = 0,
        config: LogConfig | None = None,
        run_name: str = "",
        resolved: Mapping[str, Any] | None = None,
    ) -> None:
        self._lines: FileIO | None = None
        self._sinks: list[Sink] = []
        self._trackers: dict[str, Sink] = {}
        if not enabled:
            return
        config, resolved, run_name = config or LogConfig(), resolved or {}, run_name or run_dir.name
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        try:
            records = _cut(self._path, resume_step)
            self._lines = self._path.open("ab", buffering=0)
            self._sinks.append(TensorBoardSink(run_dir, resume_step=resume_step, resolved=resolved))
        except OSError as error:
            raise self._unwritable(error, resume_step + 1) from error
        if config.wandb:
            from train.metric_sinks_wandb import WandbSink

            self._trackers["W&B"] = WandbSink(
                run_dir,
                project=config.wandb_project,
                entity=config.wandb_entity,
                run_name=run_name,
                resolved=resolved,
            )
        if config.mlflow:
            from train.metric_sinks_mlflow import MLflowSink

            self._trackers["MLflow"] = MLflowSink(
                run_dir,
                uri=config.mlflow_uri,
                experiment=config.mlflow_experiment,
                run_name=run_name,
                resolved=resolved,
            )
        for record in records:
            record.pop(TIME, None)
            self._track(int(record.pop("step")), record)

    def write(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Write one line. Tensors must have one element; reading them waits for their device.

        Raises:
            OSError: the line cannot be written, as on a full disk; the file holds whole lines all the same.
        """
        if self._lines is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        record = {"step": step} | {name: _representable(value) for name, value in values.items()}
        record[TIME] = round(time.time(), 3)
        try:
            _append(self._lines, json.dumps(record, allow_nan=False) + "\n")
            for sink in self._sinks:
                sink.write(step, values)
        except OSError as error:
            raise self._unwritable(error, step) from error
        self._track(step, values)

    def _unwritable(self, error: OSError, step: int) -> OSError:
        return OSError(
            f"{self._path.parent}: metrics of step {step} cannot be written ({error.strerror or error}); make room "
            "and start the same command again: it resumes from the last checkpoint"
        )

    def close(self, *, failed: bool = False) -> None:
        """Close files and trackers; a second call does nothing.

        Args:
            failed: the run ended before its last step, which trackers show.
        """
        sinks, trackers, lines = self._sinks, self._trackers, self._lines
        self._sinks, self._trackers, self._lines = [], {}, None
        if lines is not None:
            lines.close()
        for name, tracker in trackers.items():
            _attempt(name, partial(tracker.close, failed=failed))
        for sink in sinks:
            try:
                sink.close(failed=failed)
            except OSError as error:  # the lines are in metrics.jsonl
                logger.warning("the last of TensorBoard's points were not written: %s", error)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        """Send a line to the trackers; one that fails is left out from then on, and says so."""
        for name, tracker in list(self._trackers.items()):
            if not _attempt(name, partial(tracker.write, step, values)):
                del self._trackers[name]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`, in order, without `time`; a last line that a kill cut off is left out."""
    text = (run_dir / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    records = [record for line in text.splitlines() if (record := parse_line(line)) is not None]
    for record in records:
        record.pop(TIME, None)
    return records


def _cut(path: Path, resume_step: int) -> list[dict[str, float]]:
    """Keep the whole lines up to `resume_step` and return them; the file is replaced in one move, or stays as it is."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(line, record) for line in text.splitlines() if (record := parse_line(line)) is not None]
    kept = [(line, record) for line, record in lines if record["step"] <= resume_step]
    new_text = "".join(line + "\n" for line, _ in kept)
    if new_text != text:
        shorter = path.with_suffix(".partial")
        try:
            shorter.write_text(new_text, encoding="utf-8")
            shorter.replace(path)
        except OSError:
            shorter.unlink(missing_ok=True)
            raise
    return [record for _, record in kept]


def _append(file: FileIO, line: str) -> None:
    """Write a whole line or none, at once.

    Raises:
        OSError: none.
    """
    data, end = line.encode(), os.fstat(file.fileno()).st_size
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def _attempt(tracker: str, act: Callable[[], None]) -> bool:
    """Do it; a tracker's failure is told, and False is returned: a run does not end for it."""
    try:
        act()
    except Exception as error:  # theirs; whatever it is, metrics.jsonl has the line
        logger.warning("%s gets no more metrics of this process: %s", tracker, " ".join(str(error).split()))
        return False
    return True


def parse_line(line: str) -> dict[str, float] | None:
    """One line's numbers, `step` and perhaps `time` among them, or None where the line is no whole record."""
    try:
        record = json.loads(line)
        step = record.pop("step")
        return {"step": step} | {name: float(value) for name, value in record.items()} if type(step) is int else None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None


def _representable(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
