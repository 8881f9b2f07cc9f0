"""Where metrics go beside `metrics.jsonl`: what a sink is, TensorBoard's, and what is remembered of a tracker.

A tracker is a sink that keeps runs under ids of its own: W&B, MLflow. It takes a step once and in order; so the run
directory remembers the tracker's run, and the last step that it was sent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the lines of one run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take one line; steps rise."""

    def close(self, *, failed: bool) -> None:
        """Deliver what is still held, and let go of threads and processes.

        Args:
            failed: the run ended before its last step.
        """


class TensorBoardSink:
    """Scalars, and the configuration as text, in `events.*` of the run directory."""

    def __init__(self, run_dir: Path, *, resume_step: int, resolved: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since only one rank needs the import

        # TensorBoard hides the steps from `purge_step` on that earlier event files hold.
        self._writer = SummaryWriter(str(run_dir), purge_step=resume_step + 1)
        if resolved:
            text = yaml.safe_dump(dict(resolved), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a point of each curve, at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class TrackedRun:
    """What a run directory remembers of a tracker; each change is on the disk at once.

    Args:
        path: of the file; one that is missing or damaged is as if the tracker had never been used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id: str | None = None
        """The tracker's name for this run."""
        self.sent = 0
        """The last step that the tracker has."""
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.id, self.sent = str(stored["id"]), int(stored["sent"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; the tracker begins a new run", path)

    def begin(self, run_id: str) -> None:
        """A new run of the tracker."""
        self.id, self.sent = run_id, 0
        self._save()

    def advance(self, step: int) -> None:
        """The tracker has the lines up to `step`."""
        self.sent = step
        self._save()

    def _save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"id": self.id, "sent": self.sent}), encoding="utf-8")
        partial.replace(self._path)
