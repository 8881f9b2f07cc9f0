"""A contestant of a benchmark, in a process of its own.

Numba's type tables, thread pools, allocators and warm caches of one contestant then cannot help or hinder another. The
process sets itself up, warms up, and afterwards does as many items as it is told, measuring itself; between its turns
it waits without using a core.

What it measures of itself counts its worker processes too: wall time, CPU seconds, and the memory that the first items
take beyond what was held once everything was set up.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SETUP_PATIENCE_S = 600.0  # compiling the kernels for the first time takes a minute or two
TURN_PATIENCE_S = 300.0  # beyond what a turn should take; a loader that hangs must not hang the benchmark

PRELOADED = ("torch", "torchvision")  # 3 and 4 s; most peers import both

Run = Callable[[int], None]
"""Does the given number of items."""


class ContestantFailed(RuntimeError):
    """A contestant raised, died or hung; the message says which, and why."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is measured.

    Attributes:
        name: in the table.
        setup: called in the contestant's process; loads and compiles all that is needed, and returns what does the
            work. A module's function, since its name is what travels to the process.
        arguments: of `setup`; they are pickled.
        step: items are done in multiples of this (a batch for each worker, say).
        held_mib: memory that its process holds as long as it lives, where that is much.
        work_mib: memory that it takes beside that in its turns, where that is much.
    """

    name: str
    setup: Callable[..., Run]
    arguments: tuple[Any, ...] = ()
    step: int = 1
    held_mib: float = 0.0
    work_mib: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What the first items showed."""

    peak_mib: float
    """Memory taken beyond that of the set-up."""
    items_per_turn: int
    """Items that fill a turn's time, a multiple of the contestant's step."""
    gpu_peak_mib: float = 0.0
    """Memory of the GPU taken beyond that of the set-up, by torch's allocator."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One measured turn."""

    items: int
    seconds: float
    cpu_seconds: float


class ContestantProcess:
    """The parent's end of a contestant's process. The set-up runs at once; call `wait_for_setup` before the rest."""

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        # Forked from a server without threads or state, which has done the imports that take everyone seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._pipe, theirs = context.Pipe()
        # Not a daemon, since those may have no worker processes.
        self._process = context.Process(target=_serve, args=(theirs, contestant), name=contestant.name)
        self._process.start()
        theirs.close()

    def wait_for_setup(self) -> None:
        """Return when the contestant can start."""
        self._receive(SETUP_PATIENCE_S)

    def warm_up(self, seconds: float) -> WarmUp:
        """Let it run, and find how many items fill `seconds`."""
        self._pipe.send(("warm_up", seconds))
        warm_up: WarmUp = self._receive(seconds + TURN_PATIENCE_S)
        return warm_up

    def turn(self, items: int, seconds: float) -> Turn:
        """Let it do `items`, which should take about `seconds`."""
        self._pipe.send(("turn", items))
        turn: Turn = self._receive(seconds + TURN_PATIENCE_S)
        return turn

    def close(self) -> None:
        """End the process, and its workers."""
        with contextlib.suppress(OSError):  # it may have died already
            self._pipe.send(None)
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _receive(self, patience: float) -> Any:
        if not self._pipe.poll(patience):
            raise ContestantFailed(f"{self.name} did not answer within {patience:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ContestantFailed(f"{self.name} ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise ContestantFailed(f"{self.name} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, contestant: Contestant) -> None:
    """The contestant's end: answer each command with its result, or with the traceback of what went wrong."""
    try:
        run = contestant.setup(*contestant.arguments)
        pipe.send(None)
        while command := pipe.recv():
            name, argument = command
            pipe.send(_turn(run, argument) if name == "turn" else _warm_up(run, contestant.step, argument))
    except EOFError:  # the benchmark was stopped
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def _warm_up(run: Run, step: int, seconds: float) -> WarmUp:
    """Double the items until they take `seconds`, then aim at `seconds` a turn."""
    _return_free_memory()
    held = _held_mib()
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is held now
    gpu_held = 0.0
    if gpu := _gpu():
        gpu.reset_peak_memory_stats()
        gpu_held = gpu.memory_allocated() / 2**20
    items = step
    while (turn := _turn(run, items)).seconds < seconds:
        items *= 2
    peak = status_mib("VmHWM") + _workers_mib()
    steps = round(turn.items * seconds / turn.seconds / step)
    gpu_peak = gpu.max_memory_allocated() / 2**20 - gpu_held if (gpu := _gpu()) else 0.0
    return WarmUp(peak_mib=peak - held, items_per_turn=max(steps, 1) * step, gpu_peak_mib=gpu_peak)


def _turn(run: Run, items: int) -> Turn:
    cpu_seconds, start = _cpu_seconds(), time.perf_counter()
    run(items)
    seconds = time.perf_counter() - start
    return Turn(items=items, seconds=seconds, cpu_seconds=_cpu_seconds() - cpu_seconds)


def _cpu_seconds() -> float:
    """Used so far by this process, by its workers, and by those that have ended."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for worker in multiprocessing.active_children():
        # The fields after the name, which may hold spaces: utime and stime are numbers 14 and 15 of the whole.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _held_mib() -> float:
    return status_mib("VmRSS") + _workers_mib()


def status_mib(field: str) -> float:
    """A figure of this process's memory from /proc: VmRSS is what it holds, VmHWM the most that it has held."""
    return _kib_mib(Path("/proc/self/status"), field)


def _workers_mib() -> float:
    """What the worker processes hold that is theirs alone: pages shared with this process count once, here."""
    return sum(
        _kib_mib(Path(f"/proc/{worker.pid}/smaps_rollup"), field)
        for worker in multiprocessing.active_children()
        for field in ("Private_Clean", "Private_Dirty")
    )


def _kib_mib(path: Path, field: str) -> float:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def _gpu() -> Any:
    """torch.cuda for who has touched a GPU, else None: asking it for figures must not be what touches one."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _return_free_memory() -> None:
    """Hand freed memory back to the system, so that what is allocated next shows in what is held."""
    ctypes.CDLL(None).malloc_trim(0)
