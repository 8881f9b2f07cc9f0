"""Start the real scripts as real processes, on a small set."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 800  # the time limit of a test comes first, and shows where it stood

TINY = [
    "--augment.size=16",
    "--augment.crop_area=[0.3,1.0]",
    "--model.encoder.depth=10",
    "--model.encoder.width=0.125",
    "--model.encoder.stem=cifar",
    "--model.projection_head.out_dim=16",
    "--model.temperature=0.5",
    "--data.global_batch_size=16",
    "--schedule.warmup_epochs=1",
    "--train.epochs=3",
    "--train.precision=fp32",
    "--train.log_every=1",
    "--train.cpu_threads=1",
    "--train.device=cpu",
]


def environment():
    """Ours, without what would tell a child that it is a rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return clean | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(command, extra_environment=None, **options):
    """Start a command from the project's root; output is text."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment() | (extra_environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process, timeout_s=PATIENCE_S):
    """Wait; returns (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def pretrain(runs_dir, data, *overrides, name="run", launcher=(sys.executable,)):
    """The command that pretrains a tiny encoder."""
    return [
        *launcher,
        "train/pretrain.py",
        f"--name={name}",
        f"--runs_dir={runs_dir}",
        f"--data.path={data}",
        *TINY,
        *overrides,
    ]


def deepspeed(port, num_ranks=2):
    """The launcher; a port of its own, so that tests can run side by side."""
    return (BIN / "deepspeed", "--num_gpus", num_ranks, "--master_port", port)
