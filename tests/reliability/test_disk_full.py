"""A disk that is full, read-only or gone, under the real script and under the writer of checkpoints."""

import re
import shutil
import time

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability.checkpoint_writers import state
from tests.reliability.file_systems import fill, mounted, tmpfs
from tests.reliability.forked import Run
from tests.reliability.held import Hold
from tests.reliability.processes import PATIENCE_S, assert_same_state, curve, last_state
from tests.reliability.record import record
from train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from train.checkpoint_keeping import KeepConfig, newest_whole_checkpoint
from train.checkpoint_writer import CheckpointWriter
from train.cli import EXIT_BAD_INPUT, EXIT_FAILED

DISK_KIB = 4000
ROOM_FOR_LOGS = 250_000  # of bytes: a checkpoint of 680 kB does not fit
STEPS_PER_EPOCH = 20  # and a checkpoint at the end of each
OPTIONS = ("--train.epochs=12", "--train.keep_checkpoints=1")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("started_when_full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_on_a_disk_that_fills_up(tmp_path, started_when_full):
    data = make_beton(tmp_path / "data", [(24, 20)] * 16 * STEPS_PER_EPOCH, encode="raw").path
    other = tmp_path / "other"
    other.mkdir()
    with tmpfs(tmp_path / "disk", DISK_KIB) as disk, Run(other, data, *OPTIONS, world_size=1) as undisturbed:

        def start(hold=None):
            return Run(disk, data, *OPTIONS, world_size=1, hold=hold, outputs=tmp_path)

        hold = Hold(tmp_path, 25, 45, 65)
        with start(hold) as run:
            check_one_failure_is_a_warning(disk, run, hold)
            lost = check_three_failures_stop_the_run(disk, run, hold)
        if started_when_full:
            check_a_start_on_a_full_disk(disk, start)
        check_a_write_of_metrics_that_fails(disk, start, Hold(tmp_path, 85))
        (disk / "ballast").unlink()
        with start() as run:
            run.assert_done()
        undisturbed.assert_done()
        assert_same_state(last_state(run.run_dir), last_state(undisturbed.run_dir))
        assert curve(run.run_dir) == curve(undisturbed.run_dir)
    record(
        fault="disk full",
        done="no room for a checkpoint, for one save, then for three; then no room at all; then room again",
        runs=3 + started_when_full,
        lost_steps=lost,
        result="a warning and on; stopped by the third, exit code 1, and by metrics, exit code 2, in one line each; "
        "resumed bit-equal to the undisturbed run",
    )


def wait_until_held(run, hold, step):
    """And until nothing is being written: the last checkpoint, which is at the end of the epoch before, is there."""
    saved = [checkpoint_path(run.run_dir, step - step % STEPS_PER_EPOCH)]
    run.wait_for(lambda: hold.reached(step) and list((run.run_dir / "checkpoints").iterdir()) == saved)


def check_one_failure_is_a_warning(disk, run, hold):
    wait_until_held(run, hold, 25)
    fill(disk, leave=ROOM_FOR_LOGS)
    hold.release(25)
    log = run.run_dir / "train.log"
    run.wait_for(lambda: hold.reached(45) and "could not be written" in log.read_text())
    (disk / "ballast").unlink()
    assert re.findall("WARNING .*", log.read_text()) == [
        f"WARNING train.checkpoint_writer: checkpoint {checkpoint_path(run.run_dir, 40)} could not be written "
        "(No space left on device); the previous one is untouched; training goes on "
        "(failure 1, 3 in a row end the run)"
    ]
    hold.release(45)


def check_three_failures_stop_the_run(disk, run, hold):
    """Returns how many steps are lost."""
    wait_until_held(run, hold, 65)
    fill(disk, leave=ROOM_FOR_LOGS)
    hold.release(65)
    assert run.end() == [EXIT_FAILED], run.told()
    (error,) = run.errors()
    failed, saved = checkpoint_path(run.run_dir, 120), checkpoint_path(run.run_dir, 60)
    assert error.startswith(f"error: 3 checkpoints in a row failed: checkpoint {failed} could not be written")
    assert "Traceback" not in run.told()
    assert "Logging error" not in run.told()
    assert list((run.run_dir / "checkpoints").iterdir()) == [saved]
    assert newest_whole_checkpoint(run.run_dir)[1].position["step"] == 60
    return 120 - 60


def check_a_start_on_a_full_disk(disk, start):
    fill(disk, leave=0)
    with start() as run:
        before = {path: path.read_bytes() for path in list_checkpoints(run.run_dir)}
        assert run.end() != [0]
    (error,) = run.errors()
    assert "No space left on device" in error
    assert "Traceback" not in run.told()
    assert {path: path.read_bytes() for path in list_checkpoints(run.run_dir)} == before


def check_a_write_of_metrics_that_fails(disk, start, hold):
    """Which file is the first to fail is chance, TensorBoard's or the lines themselves; the one line is the same.

    Either needs room for the lines of an epoch: before a third checkpoint fails.
    """
    (disk / "ballast").unlink()
    with start(hold) as run:
        wait_until_held(run, hold, 85)
        fill(disk, leave=0)
        hold.release()
        assert run.end() == [EXIT_BAD_INPUT], run.told()
    (error,) = run.errors()
    assert "cannot be written (No space left on device); make room and start the same command again" in error
    assert "Traceback" not in run.told()


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
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
