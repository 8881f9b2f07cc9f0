"""What a checkpoint costs a step: how long training waits at a save, in the background and in the step; and loading.

The state is ResNet-50's as SimCLR trains it with LARS: encoder and projection head, their buffers and their momentum,
in float32 and channels_last, on the CPU. After each save the file is awaited before the next begins, so that no wait
holds an earlier write; what is awaited counts in the CPU time and not in the wait. The first save of a run makes the
memory that the later ones use again; it is part of the warm-up.

`load` reads the file, proves its checksum and gives tensors; `torch_save` is what `torch.save` takes to write the same
tensors to the same disk, flushed, without a checksum.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.conftest import Bench
from benchmarks.contestant import Turn, WarmUp, status_mib
from benchmarks.harness import Floor, Race
from model.build import ModelConfig, build_method
from train.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, named_tensors
from train.checkpoint_keeping import KeepConfig
from train.checkpoint_writer import CheckpointWriter

MIN_ROUNDS = 12  # a save is short, and disks are moody

# The copy alone against copy, checksum and disk. Half of what was measured (EPYC, ext4 on a virtual disk, November
# 2026, on a busy machine).
FLOORS = {"in_the_step": Floor(speed=5.0, goal=10.0), "torch_save": Floor(speed=5.0, goal=10.0)}


def test_checkpoint(bench: Bench, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    checkpoint = resnet50_state()
    size = sum(tensor.nbytes for tensor in named_tensors(checkpoint).values())
    print(f"\n{size / 1e6:.0f} MB in {len(named_tensors(checkpoint))} tensors")
    saving = {
        "background": saver(tmp_path / "background", checkpoint, background=True),
        "in_the_step": saver(tmp_path / "in_the_step", checkpoint, background=False),
        "torch_save": torch_saver(tmp_path / "state.pt", checkpoint),
    }
    bench.judge(race_of_waits("save_resnet50", saving, max(bench.rounds, MIN_ROUNDS)), FLOORS)
    path = checkpoint_path(tmp_path / "background", 1)
    loading = {"load": (lambda: load_checkpoint(path), lambda: None)}
    bench.judge(race_of_waits("load_resnet50", loading, max(bench.rounds, MIN_ROUNDS)), {})


Waits = tuple[Callable[[], object], Callable[[], object]]  # what training waits for, and what goes on after


def saver(run_dir: Path, checkpoint: Checkpoint, *, background: bool) -> Waits:
    writer = CheckpointWriter(run_dir, keep=KeepConfig(last=1), background=background)
    return lambda: writer.save(checkpoint), writer.finish


def torch_saver(path: Path, checkpoint: Checkpoint) -> Waits:
    def save() -> None:
        with path.open("wb") as file:
            torch.save({"model": checkpoint.model, "optimizer": checkpoint.optimizer}, file)
            file.flush()
            os.fsync(file.fileno())

    return save, lambda: None


def race_of_waits(work: str, contestants: Mapping[str, Waits], rounds: int) -> Race:
    """An item is one call; its time is that of the wait alone."""
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    peaks = dict.fromkeys(contestants, 0.0)
    for name, (wait, after) in contestants.items():
        held = status_mib("VmRSS")
        wait()
        after()
        peaks[name] = status_mib("VmRSS") - held
    for i in range(rounds):
        names = list(contestants)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait, after = contestants[name]
            start, cpu_start = time.perf_counter(), time.process_time()
            wait()
            seconds = time.perf_counter() - start
            after()
            turns[name].append(Turn(items=1, seconds=seconds, cpu_seconds=time.process_time() - cpu_start))
    warm_ups = {name: WarmUp(peak_mib=peak, items_per_turn=1) for name, peak in peaks.items()}
    return Race(work=work, unit="s", warm_ups=warm_ups, turns=turns)


def resnet50_state() -> Checkpoint:
    """As after a step of LARS."""
    method = build_method(ModelConfig(), seed=0).to(memory_format=torch.channels_last)
    momentum = {name: {"momentum": torch.randn_like(param)} for name, param in method.named_parameters()}
    return Checkpoint(model=method.state_dict(), optimizer=momentum, position={"step": 1})
