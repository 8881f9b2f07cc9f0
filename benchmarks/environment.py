"""What a result was measured on, and by which command: enough to repeat it, and to tell whether two compare."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numba",
    "numpy",
    "ffcv",
    "nvidia-dali-cuda130",
    "pillow",
    "deepspeed",
    "lightly",
    "pytorch-metric-learning",
)
# Variables that decide how many threads work and how they wait.
VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
DRIVER = Path("/proc/driver/nvidia/version")

Environment = dict[str, str | int | float]


def environment() -> Environment:
    """Device, cores, memory, load, versions and commit; of each GPU its name and memory, and their driver."""
    return {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **_gpus(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "platform": platform.platform(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def command() -> str:
    """The line that started this process, as it is typed at the root of the checkout.

    Where the images lie is not told: TWINVIEW_DATA stands for itself, and what was read is told beside it.
    """
    words = [word.replace(f"{ROOT}/", "") for word in sys.orig_argv]
    words[0] = Path(words[0]).name
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if name in os.environ]
    if "TWINVIEW_DATA" in os.environ:
        given.append('TWINVIEW_DATA="$TWINVIEW_DATA"')
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < (os.cpu_count() or 1):
        words = ["taskset", "--cpu-list", ",".join(map(str, cores)), *words]
    return " ".join([*given, shlex.join(words)])


def _gpus() -> Environment:
    """Those that this process may use, as torch names them."""
    if not torch.cuda.is_available():
        return {}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus),
        "driver": driver_version(DRIVER.read_text() if DRIVER.exists() else ""),
        "cuda": torch.version.cuda or "unknown",
    }


def driver_version(text: str) -> str:
    """The version in what the driver tells of itself under /proc; `unknown` if there is none."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit that is checked out, marked if files differ from it; `unknown` outside a repository."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout.strip() or "unknown"
