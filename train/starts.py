"""What started a run, and when: a line for each start in `starts.jsonl` of its directory, for whoever asks later.

The configuration is in `config.yaml`; here is what it does not say: the command, the machine, the versions, the commit.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from train.runtime import Ranks, package_versions

STARTS_FILE = "starts.jsonl"
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")


def record_start(run_dir: Path, ranks: Ranks, device: torch.device, *, step: int) -> None:
    """Append this start, in one write. On rank 0.

    Args:
        run_dir: exists.
        ranks: of this process.
        device: that it trains on.
        step: after which it goes on; 0 of a new run.

    Raises:
        OSError: it cannot be written.
    """
    record: dict[str, Any] = {
        "time": round(time.time(), 3),
        "step": step,
        "command": _command(ranks.world_size),
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "world_size": ranks.world_size,
        "local_world_size": ranks.local_world_size,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "versions": package_versions(),
    }
    with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _command(world_size: int) -> str:
    """What the user typed: the outermost of this process's parents that names the same script."""
    found = as_typed([sys.executable, *sys.argv])
    try:
        lines = [parent.cmdline() for parent in psutil.Process().parents()]
    except psutil.Error:
        lines = []
    for line in lines:
        if sys.argv[0] in line and Path(line[0]).name.startswith(("python", *LAUNCHERS)):
            found = as_typed(line)
    if world_size > 1 and not found.startswith(LAUNCHERS) and "torch.distributed.run" not in found:
        variables = (f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        return " ".join((*variables, found))
    return found


def as_typed(line: Sequence[str]) -> str:
    """A process's words as a shell takes them: a launcher's own script by its name, an interpreter as `python`."""
    words = [word for word in line if not word.startswith("--local_rank=")]
    if Path(words[0]).name.startswith("python"):
        words[0] = "python"
        if len(words) > 1 and Path(words[1]).name in LAUNCHERS:
            words = [Path(words[1]).name, *words[2:]]
    return shlex.join(words)


def _commit() -> str | None:
    """Of the folder that this file is in; None where that is no checkout."""
    here = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
