"""Metrics for Weights & Biases. A run that resumes goes on under its id.

W&B keeps a step once and takes no step below its latest. What a resumed run repeats is not sent again: the steps that
W&B already has stay as the process before wrote them.

Training neither waits for the network nor ends with it: wandb uploads from a process of its own, which also keeps all
lines in the run directory.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from train.cli import UnfitEnvironment
from train.metric_sinks import TrackedRun

logger = logging.getLogger(__name__)

STATE_FILE = "wandb.json"
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 30.0
FLUSH_INTERVAL_S = 1.0  # of W&B's own file, from W&B's process


class WandbSink:
    """A run at W&B.

    Args:
        run_dir: of the run; W&B's files go to `wandb` in it.
        project: of W&B.
        entity: user or team; None: the user's default.
        run_name: as W&B shows it.
        resolved: the configuration.
    """

    def __init__(
        self, run_dir: Path, *, project: str, entity: str | None, run_name: str, resolved: Mapping[str, Any]
    ) -> None:
        self._tracked = TrackedRun(run_dir / STATE_FILE)
        if self._tracked.id is None:
            self._tracked.begin(secrets.token_hex(4))
        options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": run_name,
            "id": self._tracked.id,
            "resume": "allow",
            "dir": str(run_dir),
            "config": dict(resolved),
            "allow_val_change": True,
            "settings": _settings(),
        }
        try:
            self._run = wandb.init(**options)
        except (wandb.errors.Error, OSError) as error:
            logger.warning(
                "W&B cannot be reached (%s); its lines stay in %s, and `wandb sync` uploads them",
                " ".join(str(error).split()),
                run_dir / "wandb",
            )
            wandb.teardown()  # else its process takes the id as in use
            self._run = wandb.init(**options, mode="offline")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a line to W&B's process, unless W&B has it from before a resume."""
        if step > self._tracked.sent:
            self._run.log(dict(values), step=step, commit=True)
            self._tracked.advance(step)

    def close(self, *, failed: bool) -> None:
        """Wait for the upload, but not longer than FINISH_TIMEOUT_S."""
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            logger.warning(
                "W&B did not take all lines within %.0f s; `wandb sync %s` uploads the rest",
                FINISH_TIMEOUT_S,
                self._run.settings.sync_dir,
            )


def check_wandb() -> None:
    """Refuse to begin where nobody is logged in.

    Raises:
        UnfitEnvironment: as said.
    """
    wandb.setup(_settings())
    settings = wandb.setup().settings
    if settings.mode not in {"offline", "disabled"} and not wandb.login(prompt=False, verify=False):
        raise UnfitEnvironment("`log.wandb` needs an API key; run `wandb login`, or set WANDB_MODE=offline")


def _settings() -> wandb.Settings:
    """Quiet, without a hand on our stdout and stderr, and never waiting for ever."""
    os.environ.setdefault("WANDB_SILENT", "true")  # the setting alone leaves the word of a login
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )
    if hasattr(settings, "x_transaction_log_flush_interval"):  # it is new; 15 s of lines would be lost at a kill
        settings.x_transaction_log_flush_interval = FLUSH_INTERVAL_S
    return settings
