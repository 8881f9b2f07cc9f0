"""SIGSTOP of one rank: it neither works nor dies. The others notice, name it, and end."""

import re
import signal

import pytest

from tests.reliability.forked import Run
from tests.reliability.held import Hold
from tests.reliability.launched import Launched, torchrun
from tests.reliability.record import record
from tests.reliability.whole_run import OPTIONS, STEPS, assert_as_uninterrupted, last_step, steps_told, whole_run
from train.cli import EXIT_RESUMABLE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

EACH = 8  # steps between two faults
CHECKPOINT_EVERY = 4
TIMEOUT_S = 20.0
HANGING = (*OPTIONS, f"--train.checkpoint_every={CHECKPOINT_EVERY}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def stop(run, hold, step, send):
    """In the step at which the run is held, from which on the ranks' patience is short."""
    run.wait_for(lambda: hold.reached(step))
    send()
    hold.release()


def assert_named(errors, rank, run_dir, witness):
    """In one line; and the log of the rank that waited tells where."""
    (line,) = errors
    log = run_dir / ("train.log" if witness == 0 else f"train.rank{witness}.log")
    told = rf"error: rank {rank} has hung: last heard of \d+ s ago, at step \d+, [a-z ]+; rank {witness} waited "
    assert re.match(told, line), line
    assert line.endswith(f"Stacks of all threads are in {log}; the same command goes on from the last checkpoint")
    text = log.read_text()
    assert f"rank {rank} has hung" in text
    assert "train/loop.py" in text


def test_a_rank_that_hangs_is_named_and_the_same_command_goes_on(whole, tmp_path):
    data, whole_dir = whole
    lost = []
    for victim, step in ((1, EACH), (0, 2 * EACH)):
        hold = Hold(tmp_path, step, hang_timeout_s=TIMEOUT_S)
        with Run(tmp_path, data, *HANGING, hold=hold) as run:
            stop(run, hold, step, lambda run=run, victim=victim: run.ranks[victim].send(signal.SIGSTOP))
            assert run.ranks[1 - victim].end() == EXIT_RESUMABLE
        assert_named(run.errors(), victim, run.run_dir, 1 - victim)
        lost.append(steps_told(run.run_dir) - last_step(run.run_dir))
        assert_as_uninterrupted(run.run_dir, whole_dir)
    with Run(tmp_path, data, *HANGING) as run:
        run.assert_done()
    assert last_step(run.run_dir) == STEPS
    assert_as_uninterrupted(run.run_dir, whole_dir)
    assert max(lost) < 2 * CHECKPOINT_EVERY  # the last one may not have been on the disk yet
    record(
        fault="a rank hangs",
        done=f"SIGSTOP of rank 1, and of rank 0, with `train.hang_timeout_s` {TIMEOUT_S:g}; the same command again",
        runs=3,
        lost_steps=f"{min(lost)} to {max(lost)} (a checkpoint every {CHECKPOINT_EVERY} steps)",
        result="the other rank names it, writes all stacks and ends with code 75; the end is the uninterrupted run's "
        "bit for bit",
    )


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun_is_named(whole, tmp_path):
    """Which waits 30 s for the stopped one before it kills it."""
    data, whole_dir = whole
    hold = Hold(tmp_path, EACH, hang_timeout_s=TIMEOUT_S)
    with Launched(tmp_path, data, *HANGING, launcher=torchrun(), hold=hold) as run:
        stop(run, hold, EACH, lambda: run.send_rank(1, signal.SIGSTOP))
        code, errors = run.end()
    assert code == 1
    assert_named(errors, 1, run.run_dir, 0)
    lost = steps_told(run.run_dir) - last_step(run.run_dir)
    with Run(tmp_path, data, *HANGING) as run:
        run.assert_done()
    assert_as_uninterrupted(run.run_dir, whole_dir)
    record(
        fault="a rank hangs",
        done=f"SIGSTOP of rank 1 under torchrun, with `train.hang_timeout_s` {TIMEOUT_S:g}; the same command again",
        runs=2,
        lost_steps=lost,
        result="rank 0 names it, torchrun ends both; the end is the uninterrupted run's bit for bit",
    )
