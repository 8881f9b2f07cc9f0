"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard.

`step` counts finished optimizer steps. Both files are flushed with every line, and a run that resumes after
step s cuts away what was written beyond s, so that a curve has every point once. JSON has no NaN and no
infinities: they are written as the strings "NaN", "Infinity" and "-Infinity", which `float()` reads back, as
`read_metrics` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics to a run directory; a context manager.

    Args:
        run_dir: folder of `metrics.jsonl` and `events.*`; made if it is missing.
        enabled: False on all ranks but one; then nothing is made, read or written.
        resume_step: steps that the run has already done; later lines of earlier processes are cut away.
    """

    def __init__(self, run_dir: Path, *, enabled: bool = True, resume_step: int = 0) -> None:
        self._lines: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # here, since only one rank needs the import

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _cut(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        # TensorBoard hides the steps from `purge_step` on that earlier event files hold.
        self._tensorboard = SummaryWriter(str(run_dir), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Write one line. Tensors must have one element; reading them waits for their device."""
        if self._lines is None or self._tensorboard is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        record = {"step": step} | {name: _representable(value) for name, value in values.items()}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        if self._lines is not None:
            self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lines = self._tensorboard = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`, in order; a last line that a kill cut off is left out."""
    records = (_parse(line) for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    return [record for record in records if record is not None]


def _cut(path: Path, resume_step: int) -> None:
    """Keep the whole lines up to `resume_step`; the file is replaced in one move, or stays as it is."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(
        line + "\n"
        for line in text.splitlines()
        if (record := _parse(line)) is not None and record["step"] <= resume_step
    )
    if kept != text:
        partial = path.with_suffix(".partial")
        partial.write_text(kept, encoding="utf-8")
        partial.replace(path)


def _parse(line: str) -> dict[str, float] | None:
    """One line's numbers, or None where the line is no whole record."""
    try:
        record = json.loads(line)
        return {"step": record.pop("step")} | {name: float(value) for name, value in record.items()}
    except (ValueError, AttributeError, KeyError):
        return None


def _representable(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
