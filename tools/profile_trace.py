"""A few real steps, loader included, as a trace for Chrome's and Perfetto's viewers (`ui.perfetto.dev`).

`torch.profiler` records operators, and on a GPU kernels; over them lie the named stretches `step`, `load`, `forward`,
`loss`, `backward`, `optimizer`, and `communication` while `tools.profile_communication` names it. While it records on a
GPU, the same stretches are NVTX ranges, for `nsys`. The decoding threads are compiled code, of which torch knows
nothing: what one sees of them is how long `load` waits.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tools.profile_rig import Rig
from tools.whole_file import whole_file
from train.config import PretrainConfig
from train.runtime import Ranks
from train.stages import NvtxRanges, listening, stage

WARM_UP = 8  # steps: what the loader has made ahead, and what is compiled, is over
STEPS = 4


def write_trace(config: PretrainConfig, ranks: Ranks, path: Path) -> None:
    """Record steps of a run and write rank 0's, into a file that appears when it is whole. All ranks must call.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    with closing(Rig(config, ranks)) as rig:
        on_gpu = rig.checked.device.type == "cuda"
        for _ in range(WARM_UP):
            rig.step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as recorded, ExitStack() as stack:
            if on_gpu:
                stack.enter_context(listening(NvtxRanges()))
            for _ in range(STEPS):
                with stage("step"):
                    rig.step()
            if on_gpu:
                torch.cuda.synchronize(rig.checked.device)
    if ranks.rank != 0:
        return
    with tempfile.TemporaryDirectory(prefix="twinview-trace-") as folder:
        exported = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(exported))
        with whole_file(path) as file, exported.open("rb") as text:
            while block := text.read(2**20):
                file.write(block)
