"""Processes that save checkpoints and are killed at it.

python -m tests.reliability.checkpoint_writers bytes RUN_DIR SIZE…
python -m tests.reliability.checkpoint_writers calls RUN_DIR
python -m tests.reliability.checkpoint_writers lines RUN_DIR
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from train.checkpoint import Checkpoint, checkpoint_path, save_checkpoint
from train.checkpoint_keeping import KeepConfig
from train.checkpoint_writer import CheckpointWriter


def state(step, size=40):
    """A checkpoint with something in every part."""
    parts = {
        "weight": torch.full((size, 3), float(step)),
        "count": torch.tensor(step),
        "half": torch.ones(5).bfloat16(),
    }
    return Checkpoint(
        model=parts,
        optimizer={"weight": {"momentum": torch.full((size, 3), step + 0.5)}},
        average=parts,
        probe={"weight": torch.full((7,), float(step))},
        position={"step": step, "epoch": 0},
        config={"name": "run"},
        versions={"torch": "2.11.0"},
        loader={"epoch": 0, "next_batch": step},
    )


def save(run_dir, step):
    save_checkpoint(checkpoint_path(run_dir, step), state(step))


def killed_at_bytes(run_dir, sizes):
    """For each size, a child that the kernel ends once its file is as large; prints what it leaves."""
    folder = run_dir / "checkpoints"
    save(run_dir, 1)
    for size in sizes:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python turns it into an error
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            save(run_dir, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = [path.stat().st_size for path in folder.glob(".*.partial")]
        print(size, os.WTERMSIG(status), left, sorted(path.name for path in folder.glob("step*")))


def killed_at_calls(run_dir):
    """For each line of input, a child that stops, is traced, and saves; prints its number and what ended it."""
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            save(run_dir, 2)
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), flush=True)


def save_for_each_line(run_dir):
    """For each line of input a save in the background, as in training; prints its step once it is on the disk."""
    with CheckpointWriter(run_dir, keep=KeepConfig(last=2)) as writer:
        for step, _ in enumerate(sys.stdin, start=1):
            writer.save(state(step, size=2_000 + step % 7 * 1_000))
            writer.finish()
            print(step, flush=True)


if __name__ == "__main__":
    what, run_dir, *sizes = sys.argv[1:]
    if what == "bytes":
        killed_at_bytes(Path(run_dir), [int(size) for size in sizes])
    elif what == "calls":
        killed_at_calls(Path(run_dir))
    else:
        save_for_each_line(Path(run_dir))
