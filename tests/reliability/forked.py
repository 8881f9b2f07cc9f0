"""Ranks as real processes that need not load torch and DeepSpeed anew: a start costs two seconds instead of eight.

They are forked from a server that has imported third-party packages, and none of ours; then each runs the script as
`python train/pretrain.py` would, with the environment that a launcher would give it, and no launcher.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from tests.reliability.held import hold_as_told
from tests.reliability.processes import PATIENCE_S
from tests.train.runs import ROOT, environment, pretrain
from train.runtime import free_port

PRELOADED = ["torch", "torchvision", "deepspeed", "numba", "jsonargparse", "tqdm", "torch.utils.tensorboard"]
READ_AT_IMPORT = {  # by what is preloaded; the script sets the same before it imports
    "DS_ACCELERATOR": "cpu",
    "DEEPSPEED_LOG_LEVEL": "warning",
    "GOMP_SPINCOUNT": "1000",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def context():
    """A multiprocessing context with a running server; one for each test process."""
    ours = multiprocessing.get_context("forkserver")
    ours.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ |= environment() | READ_AT_IMPORT
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return ours


class Forked:
    """A process that runs `work(*arguments)`; what it writes on stdout and stderr goes into `output`."""

    def __init__(self, output, variables, work, *arguments):
        self.output = output
        self.process = context().Process(target=_begin, args=(output, variables, work, arguments))
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()

    def running(self):
        return self.process.exitcode is None

    def end(self, timeout_s=PATIENCE_S):
        """Wait for it; returns the exit code."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"did not end:\n{self.text()[-4000:]}"
        return self.process.exitcode

    def text(self):
        return Path(self.output).read_text()

    def errors(self):
        """What it told the user."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]


def _begin(output, variables, work, arguments):
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= variables
    os.chdir(ROOT)
    work(*arguments)


def run_script(words):
    hold_as_told()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Run:
    """The ranks of one start of the script; a context manager that leaves none behind.

    Args:
        runs_dir, data, overrides: as `pretrain` takes them.
        world_size: number of ranks.
        hold: the `Hold` that stops it at some steps.
        outputs: folder for what the ranks print; default: `runs_dir`.
    """

    def __init__(self, runs_dir, data, *overrides, world_size=2, hold=None, outputs=None):
        words = [str(word) for word in pretrain(runs_dir, data, *overrides, launcher=())]
        port = free_port()
        self.run_dir = Path(runs_dir, "run")
        self.ranks = [
            Forked(
                Path(outputs or runs_dir, f"output-{rank}"),
                variables_of(rank, world_size, port) | (hold.variables if hold else {}),
                run_script,
                words,
            )
            for rank in range(world_size)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()

    def wait_for(self, condition, timeout_s=PATIENCE_S):
        """Until `condition()` holds; all ranks must live as long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert all(rank.running() for rank in self.ranks), self.told()
            assert time.monotonic() < deadline, f"waited in vain: {self.told()}"
            time.sleep(0.01)

    def send(self, number):
        """To all ranks, as a scheduler does it."""
        for rank in self.ranks:
            rank.send(number)

    def end(self):
        """Wait for all ranks; returns their exit codes."""
        return [rank.end() for rank in self.ranks]

    def assert_done(self):
        assert self.end() == [0] * len(self.ranks), self.told()

    def told(self):
        return "\n".join(rank.text()[-3000:] for rank in self.ranks)

    def errors(self):
        return [line for rank in self.ranks for line in rank.errors()]


def variables_of(rank, world_size, port):
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


KILLED = -signal.SIGKILL
