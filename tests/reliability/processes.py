"""Real runs of the scripts, to be hit by faults: start, wait, kill, compare."""

import os
import signal
import time
from pathlib import Path

import torch

from train.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from train.metrics import read_metrics

CLOCKS = ("images_per_sec", "data_wait")  # what differs between two equal runs
PATIENCE_S = 400  # with what a slow machine, busy with other tests, does in a moment


def wait_for(condition, process, timeout_s=PATIENCE_S):
    """Until `condition()` holds; the process must live as long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ranks_of(runs_dir):
    """{rank: process id} of the training processes that write under `runs_dir`, as /proc tells."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = Path("/proc", entry.name, "cmdline").read_bytes().split(b"\0")
            variables = Path("/proc", entry.name, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--runs_dir={runs_dir}".encode() in command and b"train/pretrain.py" in command:
            values = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            if b"LOCAL_RANK" in values:  # else a launcher
                found[int(values[b"RANK"])] = int(entry.name)
    return found


def kill_stragglers(runs_dir):
    """Kill what a launcher may have left behind: DeepSpeed starts the ranks in sessions of their own."""
    for process_id in ranks_of(runs_dir).values():
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            continue


def num_checkpoints(run_dir):
    return len(list_checkpoints(run_dir))


def last_state(run_dir):
    return load_checkpoint(latest_checkpoint(run_dir))


def curve(run_dir):
    """What training did: every metric but the clock's."""
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in read_metrics(run_dir)]


def assert_same_state(ours, theirs):
    """Bit for bit."""
    assert ours.position == theirs.position
    assert ours.loader == theirs.loader
    assert_same_tensors(ours.model, theirs.model)
    assert_same_tensors(ours.average, theirs.average)
    assert_same_tensors(ours.probe, theirs.probe)
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    for key, slots in ours.optimizer.items():
        assert_same_tensors(slots, theirs.optimizer[key])


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
