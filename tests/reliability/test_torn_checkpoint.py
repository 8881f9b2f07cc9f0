"""Checkpoints cut off, flipped, or half written: by hand at every byte, and by kills at every byte and system call."""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.pipelines.betons import make_beton
from tests.reliability.checkpoint_writers import save
from tests.reliability.processes import PATIENCE_S, assert_same_state, curve, last_state
from tests.reliability.record import record
from tests.train.runs import finish, pretrain, start
from train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from train.checkpoint_keeping import newest_whole_checkpoint

WRITERS = "tests.reliability.checkpoint_writers"


def regions(content):
    """{name: range of bytes} of a checkpoint's file."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    metadata = text.index(b'"__metadata__"')
    end = text.index(b"}", text.index(b'"crc32"'))
    found = {
        "length": range(8),
        "metadata": range(8 + metadata, 8 + end),
        "header": range(8 + end, 8 + length),
    }
    for name, entry in json.loads(text).items():
        if name != "__metadata__":
            begin, stop = entry["data_offsets"]
            found[name] = range(8 + length + begin, 8 + length + stop)
    return found


def borders(found):
    """First and last bytes of all regions."""
    return {position for span in found.values() for position in (span.start, span.stop - 1)}


def region_of(found, position):
    return next((name for name, span in found.items() if position in span), "header")


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_cut_off_or_flipped_anywhere_is_passed_over(tmp_path, caplog, stride):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint_path(tmp_path, 2)
    whole = path.read_bytes()
    found = regions(whole)
    assert {"length", "metadata", "header", "model.weight", "optimizer.weight.momentum", "probe.weight"} <= set(found)
    positions = sorted(borders(found) | set(range(0, len(whole), stride)))
    stopped = 0
    for position in positions:
        path.write_bytes(whole[:position])
        assert newest_whole_checkpoint(tmp_path)[1].position["step"] == 1, position
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        refusal = why_not_the_one_before(tmp_path)
        if refusal:  # what the file says that it is has changed: nobody can know whether that is damage
            assert re.search("is a safetensors file, but not|has checkpoint format", refusal), position
            assert region_of(found, position) == "metadata"
            stopped += 1
        caplog.clear()
    assert stopped < 60
    path.write_bytes(whole + b"\0")
    assert newest_whole_checkpoint(tmp_path)[1].position["step"] == 1
    path.write_bytes(whole)
    assert newest_whole_checkpoint(tmp_path)[1].position["step"] == 2
    record(
        fault="a torn checkpoint",
        done=f"cut off at, and a bit flipped in, {'every' if stride == 1 else 'each fifth'} byte and each border of "
        f"{len(found)} regions: length, header, metadata, tensors",
        runs=2 * len(positions),
        lost_steps="back to the checkpoint before",
        result=f"refused by name; {stopped} flips in the file's name of its own format stop the run by name",
    )


def why_not_the_one_before(run_dir):
    """Step 1 is what a run goes on from, unless it stops."""
    try:
        checkpoint = newest_whole_checkpoint(run_dir)[1]
    except ValueError as error:
        return str(error)
    assert checkpoint.position["step"] == 1
    return None


# Writers that are killed


def test_a_writer_killed_at_any_byte_leaves_no_torn_file(tmp_path):
    """The kernel ends it by SIGXFSZ after exactly so many bytes of the file."""
    sample = tmp_path / "sample"
    save(sample, 2)
    whole = checkpoint_path(sample, 2).read_bytes()
    sizes = sorted(borders(regions(whole)) | set(range(0, len(whole), 211)))
    run_dir = tmp_path / "run"
    code, out, err = finish(start([sys.executable, "-m", WRITERS, "bytes", run_dir, *sizes]))
    assert code == 0, err
    expected = [f"{size} {int(signal.SIGXFSZ)} [{size}] ['step-000000001.safetensors']" for size in sizes]
    assert out.splitlines() == expected
    save(run_dir, 2)  # removes what the last one left
    assert newest_whole_checkpoint(run_dir)[1].position["step"] == 2
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-000000001.safetensors",
        "step-000000002.safetensors",
    ]
    record(
        fault="a kill in the middle of a checkpoint write",
        done="the kernel ends the writer after n bytes of the file, in every region of it",
        runs=len(sizes),
        lost_steps="back to the checkpoint before",
        result="no torn file bears a checkpoint's name; the next save removes the remains",
    )


# What a save asks of the file system, of which there are several on some machines.
CALLS = ("openat", "newfstatat", "getdents64", "lseek", "write", "fsync", "close", "rename")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_writer_killed_at_any_system_call_leaves_a_whole_file(tmp_path):
    run_dir = tmp_path / "run"
    save(run_dir, 1)
    process = start([sys.executable, "-m", WRITERS, "calls", run_dir], stdin=subprocess.PIPE)
    try:
        outcomes = Counter()
        for name in CALLS:
            for count in itertools.count(1):
                checkpoint_path(run_dir, 2).unlink(missing_ok=True)
                if not killed_at(process, name, count):
                    break
                checkpoint = newest_whole_checkpoint(run_dir)[1]
                assert [load_checkpoint(path).position["step"] for path in list_checkpoints(run_dir)] in ([1], [1, 2])
                assert torch.equal(checkpoint.model["weight"], torch.full((40, 3), float(checkpoint.position["step"])))
                outcomes[checkpoint.position["step"]] += 1
        assert newest_whole_checkpoint(run_dir)[0] == checkpoint_path(run_dir, 2)
        assert min(outcomes[1], outcomes[2]) >= 2, outcomes  # before the rename and after it
    finally:
        process.kill()
        process.communicate()
    record(
        fault="a kill in the middle of a checkpoint write",
        done="SIGKILL at each system call on a file or folder that a save makes",
        runs=sum(outcomes.values()),
        lost_steps="back to the checkpoint before, or none",
        result="the old file or the new one, whole",
    )


def killed_at(process, name, count):
    """Have a child of `process` save, and SIGKILL it at its count-th call of a name; False where it has fewer."""
    process.stdin.write("\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    tracer = subprocess.Popen(
        ["strace", "-qq", "-o", "/dev/null", "-p", str(child), "-e", f"inject={name}:signal=KILL:when={count}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while tracer.poll() is None and not traced(child):
        time.sleep(0.002)
    if tracer.poll() is not None:
        os.kill(child, signal.SIGKILL)
        pytest.skip(f"strace is not permitted: {tracer.stderr.read()}")
    os.kill(child, signal.SIGCONT)
    ended_by = int(process.stdout.readline())
    tracer.communicate()
    return ended_by == signal.SIGKILL


def traced(process_id):
    return "TracerPid:\t0\n" not in Path(f"/proc/{process_id}/status").read_text(encoding="ascii")


def save_for_ever(path):
    for step in range(10**9):
        values = torch.full((500_000,), float(step))
        save_checkpoint(path, Checkpoint(model={"a": values, "b": values + 0.5}, position={"step": step}))


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    context = multiprocessing.get_context("forkserver")  # whose children start in a moment
    context.set_forkserver_preload(["train.checkpoint"])
    path = tmp_path / "step.safetensors"
    delays = random.Random(0)
    left_behind = 0  # a third of the kills or fewer hit a save
    for num_kills in itertools.count(1):
        process = context.Process(target=save_for_ever, args=(path,), daemon=True)
        path.unlink(missing_ok=True)
        process.start()
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delays.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = load_checkpoint(path)
        assert bool((loaded.model["a"] == loaded.position["step"]).all())
        assert bool((loaded.model["b"] == loaded.position["step"] + 0.5).all())
        left_behind += sum(file != path for file in tmp_path.iterdir())
        if num_kills >= 10 and left_behind >= 2:
            break
        assert num_kills < 200, "no kill hit a save: the test shows nothing"
    record(
        fault="a kill in the middle of a checkpoint write",
        done="SIGKILL at random moments of a process that does nothing but save",
        runs=num_kills,
        lost_steps="back to the checkpoint before, or none",
        result=f"a whole file each time; {left_behind} kills hit a write",
    )


# The script


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    data = make_beton(tmp_path / "data", [(24, 20)] * 96, encode="raw").path
    options = ("--train.epochs=2", "--train.checkpoint_every=2", "--train.keep_checkpoints=9")
    command = pretrain(tmp_path, data, *options)
    code, _, err = finish(start(command))
    assert code == 0, err
    whole, lines = last_state(tmp_path / "run"), curve(tmp_path / "run")
    paths = list_checkpoints(tmp_path / "run")
    assert [path.stem for path in paths] == [f"step-{step:09d}" for step in (2, 4, 6, 8, 10, 12)]
    paths[-1].write_bytes(paths[-1].read_bytes()[:-1])
    flipped = bytearray(paths[-2].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    paths[-2].write_bytes(flipped)
    code, _, err = finish(start(command))
    assert code == 0, err
    for path, reason in ((paths[-1], "was cut off or damaged"), (paths[-2], "does not match its checksum")):
        assert re.search(f"WARNING: {path.name} is passed over: .*{reason}", err), err
    assert_same_state(last_state(tmp_path / "run"), whole)
    assert curve(tmp_path / "run") == lines
    record(
        fault="a torn checkpoint",
        done="the newest file of a run cut off, a bit flipped in the one before; the run started again",
        runs=1,
        lost_steps=4,
        result="both named in a warning; bit-equal to the uninterrupted run",
    )
    check_all_damaged(tmp_path / "run", command)


def check_all_damaged(run_dir, command):
    for path in list_checkpoints(run_dir):
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = finish(start(command))
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: all checkpoints in {run_dir / 'checkpoints'} are damaged (step-000000012")
    record(
        fault="a torn checkpoint",
        done="every file of a run cut off; the run started again",
        runs=1,
        lost_steps="none done",
        result="one line that names them, exit code 2; nothing is overwritten",
    )
