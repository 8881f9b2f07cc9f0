"""A disk that is full, read-only or gone, under the real script and under the writer of checkpoints."""

import re
import shutil
import signal
import time
from contextlib import contextmanager

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability.checkpoint_writers import state
from tests.reliability.file_systems import fill, mounted, tmpfs
from tests.reliability.processes import assert_same_state, curve, kill_stragglers, last_state, wait_for
from tests.reliability.record import record
from tests.train.runs import finish, pretrain, start
from train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from train.checkpoint_keeping import KeepConfig, newest_whole_checkpoint
from train.checkpoint_writer import CheckpointWriter

DISK_KIB = 4000
ROOM_FOR_LOGS = 250_000  # of bytes: a checkpoint of 680 kB does not fit
STEPS_PER_EPOCH = 20
OPTIONS = ("--train.epochs=12", "--train.keep_checkpoints=1", "--train.log_every=5")


def fill_between_saves(disk, process):
    """Take the room that a checkpoint needs, while one file is there, whole, and nothing else is being written."""
    while True:
        wait_for(lambda: num_files(disk) == 1, process)
        with paused(process):
            if num_files(disk) == 1:
                fill(disk, leave=ROOM_FOR_LOGS)
                return


def num_files(disk):
    return len(list((disk / "run" / "checkpoints").iterdir()))


@contextmanager
def paused(process):
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("started_when_full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_on_a_disk_that_fills_up(tmp_path, started_when_full):
    data = make_beton(tmp_path / "data", [(24, 20)] * 16 * STEPS_PER_EPOCH, encode="raw").path
    with tmpfs(tmp_path / "disk", DISK_KIB) as disk:
        undisturbed = start(pretrain(tmp_path / "other", data, *OPTIONS))
        command = pretrain(disk, data, *OPTIONS)
        process = start(command)
        try:
            check_one_failure_is_a_warning(disk, process)
            stopped_at = check_three_failures_stop_the_run(disk, process)
            if started_when_full:
                check_a_start_on_a_full_disk(disk, command)
            check_a_write_of_metrics_that_fails(disk, command)
            (disk / "ballast").unlink()
            process = start(command)
            code, _, err = finish(process)
            assert code == 0, err
            code, _, err = finish(undisturbed)
            assert code == 0, err
            assert_same_state(last_state(disk / "run"), last_state(tmp_path / "other" / "run"))
            assert curve(disk / "run") == curve(tmp_path / "other" / "run")
        finally:
            for runs_dir in (disk, tmp_path / "other"):
                kill_stragglers(runs_dir)
            for one in (process, undisturbed):
                one.kill()
                one.communicate()
    record(
        fault="disk full",
        done="no room for a checkpoint, for one save, then for three; then no room at all; then room again",
        runs=3 + started_when_full,
        lost_steps=stopped_at,
        result="a warning and on; stopped by the third, exit code 1, and by metrics, exit code 2, in one line each; "
        "resumed bit-equal to the undisturbed run",
    )


def steps(run_dir):
    return [int(path.stem.removeprefix("step-")) for path in list_checkpoints(run_dir)]


def log_of(disk):
    path = disk / "run" / "train.log"
    return path.read_text() if path.exists() else ""


def wait_for_checkpoint_after(step, disk, process):
    wait_for(lambda: max(steps(disk / "run"), default=0) > step, process)


def check_one_failure_is_a_warning(disk, process):
    wait_for_checkpoint_after(0, disk, process)
    fill_between_saves(disk, process)
    before = max(steps(disk / "run"))
    wait_for(lambda: "could not be written" in log_of(disk), process)
    with paused(process):
        (disk / "ballast").unlink()
    assert re.search(
        r"WARNING train\.checkpoint_writer: checkpoint \S+step-\d+\.safetensors could not be written "
        r"\(No space left on device\); the previous one is untouched; training goes on "
        r"\(failure 1, 3 in a row end the run\)\n",
        log_of(disk),
    )
    wait_for_checkpoint_after(before, disk, process)


def check_three_failures_stop_the_run(disk, process):
    """Returns how many steps are lost."""
    fill_between_saves(disk, process)
    code, _, err = finish(process)
    newest = max(steps(disk / "run"))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1, err
    assert len(errors) == 1
    assert errors[0].startswith("error: 3 checkpoints in a row failed: checkpoint ")
    assert "Traceback" not in err
    assert "Logging error" not in err
    failed = int(re.search(r"step-0*(\d+)\.safetensors could not be written", errors[0])[1])
    assert failed == newest + 3 * STEPS_PER_EPOCH
    assert newest_whole_checkpoint(disk / "run")[1].position["step"] == newest
    return failed - newest


def check_a_start_on_a_full_disk(disk, command):
    before = {path: path.read_bytes() for path in list_checkpoints(disk / "run")}
    fill(disk, leave=0)
    code, _, err = finish(start(command))
    assert code != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in list_checkpoints(disk / "run")} == before


def check_a_write_of_metrics_that_fails(disk, command):
    """Which file is the first to fail is chance, TensorBoard's or the lines themselves; the one line is the same."""
    (disk / "ballast").unlink()
    process = start(command)
    newest = max(steps(disk / "run"))
    wait_for_checkpoint_after(newest, disk, process)
    with paused(process):
        fill(disk, leave=0)
    code, _, err = finish(process)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1
    assert "cannot be written (No space left on device); make room and start the same command again" in errors[0]
    assert "Traceback" not in err


# Folders that cannot be written, under the writer alone


def writer_of(run_dir):
    return CheckpointWriter(run_dir, keep=KeepConfig(last=2))


def whole_steps(run_dir):
    return [load_checkpoint(path).position["step"] for path in list_checkpoints(run_dir)]


def test_a_folder_that_becomes_read_only_and_writable_again(tmp_path, caplog):
    run_dir = tmp_path / "run"
    with writer_of(run_dir) as writer:
        writer.save(state(1))
        writer.save(state(2))
        writer.finish()
        with mounted(run_dir / "checkpoints", "-t", "tmpfs", "-o", "ro,size=64k", "none"):
            writer.save(state(3))
            wait_until(lambda: "could not be written" in caplog.text)
        assert f"{checkpoint_path(run_dir, 3)} could not be written (Read-only file system)" in caplog.text
        writer.save(state(4))
        writer.finish()
    assert whole_steps(run_dir) == [2, 4]
    record(
        fault="the checkpoints' folder read-only",
        done="a read-only file system in its place for one save",
        runs=1,
        lost_steps="none",
        result="a warning; the next checkpoint is written",
    )


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    run_dir = tmp_path / "run"
    with writer_of(run_dir) as writer:
        writer.save(state(1))
        writer.finish()
        shutil.rmtree(run_dir)
        writer.save(state(2))
        writer.finish()
    assert whole_steps(run_dir) == [2]
    record(
        fault="the run's folder deleted",
        done="everything removed between two saves",
        runs=1,
        lost_steps="none",
        result="the next checkpoint makes it again",
    )


def test_a_disk_too_small_for_a_checkpoint_keeps_the_one_before_at_every_size(tmp_path):
    """Wherever in the file the room ends."""
    sizes = range(60, 260, 20)
    for size_kib in sizes:
        with tmpfs(tmp_path / "disk", size_kib) as disk, writer_of(disk) as writer:
            writer.save(state(1, size=1500))
            writer.finish()
            writer.save(state(2, size=9000))
            with pytest.raises(Exception, match=r"^the newest state is not saved: .* \(No space left on device\)"):
                writer.finish()
            assert whole_steps(disk) == [1]
            assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-000000001.safetensors"]
    record(
        fault="disk full",
        done=f"a checkpoint of 430 kB on file systems of {sizes[0]} to {sizes[-1]} kB",
        runs=len(sizes),
        lost_steps="back to the checkpoint before",
        result="the one before is whole, nothing half-written stays",
    )


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
