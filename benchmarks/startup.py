"""Races of start-ups: the time from starting a process to the line that says it is ready.

The line holds the most memory that the process has held, in MiB: asked for from outside, it could be gone already, and
what the system adds up for an ended process begins with its parent's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.contestant import SETUP_PATIENCE_S, ContestantFailed, Turn, WarmUp
from benchmarks.harness import Race

ROOT = Path(__file__).parents[1]


def startup_race(work: str, commands: Mapping[str, Sequence[str]], *, rounds: int) -> Race:
    """Start each contestant once so that caches on disk are filled, and then once a round, in turn.

    An item is a start-up. Its CPU time is the process's until its end.

    Args:
        work: its name.
        commands: by contestant, the arguments of Python.
        rounds: measured start-ups of each contestant.

    Raises:
        ContestantFailed: a process ended before its line, or failed.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        # Python's own cache, which an environment may have switched off, is filled like the kernels'.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
        for name, arguments in commands.items():
            _start_up(name, arguments, environment)
        turns: dict[str, list[Turn]] = {name: [] for name in commands}
        peaks = dict.fromkeys(commands, 0.0)
        for _ in range(rounds):
            for name, arguments in commands.items():
                turn, peak = _start_up(name, arguments, environment)
                turns[name].append(turn)
                peaks[name] = max(peaks[name], peak)
    warm_ups = {name: WarmUp(peak_mib=peak, items_per_turn=1) for name, peak in peaks.items()}
    return Race(work=work, unit="s", warm_ups=warm_ups, turns=turns)


def _start_up(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Turn, float]:
    """One start-up, and the MiB that its process says it held."""
    command = [sys.executable, *arguments]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout
        patience = threading.Timer(SETUP_PATIENCE_S, process.kill)
        patience.start()
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()  # until it has ended
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        patience.cancel()
    if not line or process.returncode:
        raise ContestantFailed(f"{name} ended with exit code {process.returncode} before its first batch")
    return Turn(items=1, seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime), float(line)
