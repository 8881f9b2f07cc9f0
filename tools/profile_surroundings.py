"""What one must know beside a profile to judge it: the set as it is stored, free memory, what is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from pipelines.beton import MODE_JPEG, MODE_RAW
from pipelines.build import Data, ImageFolder, Subset, whole_of
from pipelines.folder_dataset import list_images
from pipelines.resident_loader import free_bytes
from tools.profile_model import Surroundings

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # as Linux names them on x86 and ARM
CGROUP = Path("/sys/fs/cgroup")


def survey(data: Data, device: torch.device) -> Surroundings:
    """Look at the set's tables and at this machine; nothing is decoded."""
    whole = whole_of(data)
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else psutil.virtual_memory().total
    machine: dict[str, Any] = {
        "free_memory": cacheable_memory(),
        "device_memory": int(memory),
        "device_free": free_bytes(device),
        "fast_bf16": torch.cuda.get_device_capability(device) >= (8, 0) if gpu else cpu_has_bf16(),
        "has_dali": importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.dali") is not None,
    }
    if isinstance(whole, ImageFolder):
        num_bytes = sum(Path(file).stat().st_size for file, _ in list_images(whole.root))
        return Surroundings(set_bytes=num_bytes, stored="files", mean_pixels=0.0, longest_side=0, **machine)
    rows = data.rows if isinstance(data, Subset) else slice(None)
    widths, heights, modes = whole.widths[rows], whole.heights[rows], whole.modes[rows]
    stored: Literal["jpeg", "raw", "mixed"] = "mixed"
    if (modes == MODE_JPEG).all() or (modes == MODE_RAW).all():
        stored = "jpeg" if modes[0] == MODE_JPEG else "raw"
    return Surroundings(
        set_bytes=int(whole.sizes[rows].sum()),
        stored=stored,
        mean_pixels=float((widths.astype(np.int64) * heights).mean()),
        longest_side=int(np.median(np.maximum(widths, heights))),
        **machine,
    )


def cacheable_memory() -> int:
    """Bytes that the page cache may fill, what it holds already included; within the control group's limit."""
    free = int(psutil.virtual_memory().available)
    limit, used, stat = CGROUP / "memory.max", CGROUP / "memory.current", CGROUP / "memory.stat"
    if not all(path.is_file() for path in (limit, used, stat)) or (most := limit.read_text().strip()) == "max":
        return free
    cached = next((int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("file ")), 0)
    return min(free, max(0, int(most) - int(used.read_text()) + cached))


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers with instructions of its own."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return not set(CPU_BF16).isdisjoint(line.split())
    return False
