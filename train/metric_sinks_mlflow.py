"""Metrics for MLflow. A run that resumes goes on under its id.

MLflow keeps every point it is sent, so what a resumed run repeats is not sent again: the steps that MLflow already has
stay as the process before wrote them.

All talk with the server happens on a thread, so that training never waits for it. What the server does not take is
kept, told once, and sent again with the next line; what it has not taken at the end comes with the next resume.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.metric_sinks import TrackedRun

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

STATE_FILE = "mlflow.json"
PARAMS_PER_REQUEST = 100  # MLflow's limit
CLOSE_TIMEOUT_S = 30.0


class MLflowSink:
    """A run at MLflow.

    Args:
        run_dir: of the run; its id at MLflow is kept there.
        uri: of the tracking server or store; None: MLFLOW_TRACKING_URI, or MLflow's default.
        experiment: of MLflow; made if it is missing.
        run_name: as MLflow shows it.
        resolved: the configuration; becomes the run's parameters, once.
    """

    def __init__(
        self, run_dir: Path, *, uri: str | None, experiment: str, run_name: str, resolved: Mapping[str, Any]
    ) -> None:
        self._uri, self._experiment, self._run_name, self._resolved = uri, experiment, run_name, resolved
        self._tracked = TrackedRun(run_dir / STATE_FILE)
        self._pending: deque[tuple[int, int, dict[str, float]]] = deque()
        self._last_step = self._tracked.sent  # the last line that was taken in
        self._news, self._is_closing, self._failed = threading.Event(), False, False
        self._has_complained = False
        self._run: tuple[MlflowClient, str] | None = None
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Leave a line for the thread, unless MLflow has it from before a resume."""
        if step <= self._last_step:
            return
        self._last_step = step
        self._pending.append((step, int(time.time() * 1000), dict(values)))
        self._news.set()

    def close(self, *, failed: bool) -> None:
        """Wait for the server, but not longer than CLOSE_TIMEOUT_S."""
        self._failed, self._is_closing = failed, True
        self._news.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._pending:
            logger.warning(
                "MLflow did not take %d lines of metrics; they follow when the run is resumed", len(self._pending)
            )

    def _deliver(self) -> None:
        """The thread: send what is pending, whenever there is something new, until the end."""
        is_closing = False
        while not is_closing:
            self._news.wait()
            self._news.clear()
            is_closing = self._is_closing
            try:
                self._send()
                if is_closing:
                    self._end()
            except Exception as error:  # whatever a server or a network does, the run goes on
                self._complain(error)

    def _send(self) -> None:
        client, run_id = self._run = self._run or self._open()
        from mlflow.entities import Metric

        while self._pending:
            step, now, values = self._pending[0]
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])
            self._tracked.advance(step)
            self._pending.popleft()

    def _end(self) -> None:
        if self._run is not None:
            client, run_id = self._run
            client.set_terminated(run_id, "FAILED" if self._failed else "FINISHED")

    def _open(self) -> tuple[MlflowClient, str]:
        """Find the run, or make it with its parameters."""
        # Set before the import: the client would report its use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # we send again ourselves
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        if self._tracked.id is not None:
            client.update_run(self._tracked.id, status="RUNNING")
            return client, self._tracked.id
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        run_id = client.create_run(experiment, run_name=self._run_name).info.run_id
        params = [Param(key, value) for key, value in flat_params(self._resolved).items()]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        self._tracked.begin(run_id)
        return client, run_id

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            logger.warning(
                "MLflow does not take metrics: %s; they are kept and sent later", " ".join(str(error).split())
            )
        self._has_complained = True


def flat_params(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as MLflow's parameters: dotted keys, values as text."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat
