"""The process and its machine: ranks, device, threads, logs, versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
import random
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from train.cli import UnfitEnvironment
from train.console import Console
from train.network import interface_to
from train.slurm import slurm_ranks

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
PORTS = range(22_000, 32_000)  # above those of most jobs under Slurm, below those that the kernel lends
PACKAGES = ("torch", "torchvision", "deepspeed", "ffcv", "numba", "numpy", "nvidia-dali-cuda130")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands among those that the launcher started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_ranks() -> Ranks:
    """The ranks that `deepspeed`, `torchrun` or `srun` put into the environment; a plain `python` run is rank 0 of 1.

    The variables that are missing are set, since DeepSpeed would otherwise go looking for MPI; so is, where the ranks
    are on several machines, the network interface that gloo takes.
    """
    if "RANK" not in os.environ:
        for name, value in slurm_ranks(os.environ).items():
            os.environ.setdefault(name, value)
    for name, default in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, default)
    if "MASTER_PORT" not in os.environ:  # a single rank meets nobody: whichever port is free when it listens
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else str(free_port())
    world_size = int(os.environ["WORLD_SIZE"])
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size),
    )
    if ranks.local_world_size < world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_to(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return ranks


def choose_device(wanted: Literal["auto", "cpu", "cuda"], ranks: Ranks) -> torch.device:
    """The device of this rank.

    Raises:
        UnfitEnvironment: a GPU was asked for and there is none for this rank.
    """
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus <= ranks.local_rank:
        raise UnfitEnvironment(
            f"device {wanted} was asked for and rank {ranks.rank} needs GPU number {ranks.local_rank}, but torch sees "
            f"{num_gpus} GPUs; start fewer ranks, or ask for the cpu"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def cores_per_rank(ranks: Ranks) -> int:
    """The CPU cores that this process may use, shared fairly between the ranks of its machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)


def keep_freed_memory() -> None:
    """Have glibc keep what training frees, instead of giving it back to the kernel at every step.

    Activations are large and freed at each step; by default each comes as fresh, zeroed pages. On one core, a ResNet-10
    of width 16 trains 1.4 times as fast with this. Does nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def log_path(run_dir: Path, ranks: Ranks) -> Path:
    """The log file of this rank."""
    return run_dir / ("train.log" if ranks.rank == 0 else f"train.rank{ranks.rank}.log")


def configure_logging(run_dir: Path, ranks: Ranks) -> Console:
    """Log to the run directory, a file a rank, and on rank 0 warnings to the console as well, which is returned.

    What Python's `warnings` and DeepSpeed have to say lands there too.
    """
    file = LogFile(log_path(run_dir, ranks), encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = Console(enabled=ranks.rank == 0)
    root = logging.getLogger()
    for earlier in root.handlers:  # of a run before this one, in the same process
        if isinstance(earlier, LogFile):
            earlier.close()
    root.handlers = [file, console]
    root.setLevel(logging.WARNING)
    for package in ("pipelines", "model", "train"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    deepspeed = logging.getLogger("DeepSpeed")  # keeps its records from the root, and has a stream of its own
    deepspeed.handlers = [file, console]
    threading.excepthook = _log_thread_error
    return console


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: a line is lost then, which the console hears once, and nothing else."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 — logging's name
        """In place of a traceback on the console."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(f"WARNING: {self.baseFilename} lacks lines ({error.strerror or error})\n")


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    """A line on the console, the traceback in the log file: whoever waits for the thread learns of it as well."""
    name = error.thread.name if error.thread else "a thread"
    logger.warning("%s ended: %s", name, " ".join(str(error.exc_value).split()))
    trace = "".join(traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback))
    logger.info("%s", trace)


def package_versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def free_port() -> int:
    """A TCP port of this machine that nothing listens on.

    Below those that the kernel lends to connections: one of these may be lent before it is bound.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as server, suppress(OSError):
            server.bind(("", port))
            return port
