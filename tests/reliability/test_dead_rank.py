"""SIGKILL of one rank: the others say which one it was, end, and the same command goes on."""

import re
import signal

import pytest

from tests.reliability.forked import KILLED, Run
from tests.reliability.held import Hold
from tests.reliability.launched import Launched, deepspeed_launcher
from tests.reliability.record import record
from tests.reliability.whole_run import OPTIONS, STEPS, assert_as_uninterrupted, last_step, steps_told, whole_run
from train.cli import EXIT_RESUMABLE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

EACH = 6  # steps between two deaths, at least
CHECKPOINT_EVERY = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def assert_names(line, rank, step):
    """By number, by the step after the last one that the metrics tell of, and by what it did."""
    found = re.match(rf"error: (?:rank \d: )?rank {rank} was lost at step (\d+) \(last heard of \d+\.\d s ago, ", line)
    assert found, line
    assert step <= int(found[1]) <= step + 1
    assert line.endswith("; the same command goes on from the last checkpoint")


def test_a_rank_that_dies_is_named_and_the_same_command_goes_on(whole, tmp_path):
    data, whole_dir = whole
    options = (*OPTIONS, f"--train.checkpoint_every={CHECKPOINT_EVERY}")
    lost = []
    told = 0  # steps
    for victim in (1, 0):
        hold = Hold(tmp_path, told + EACH + 1)
        with Run(tmp_path, data, *options, hold=hold) as run:
            run.wait_for(lambda wanted=told + EACH: steps_told(run.run_dir) >= wanted)
            run.ranks[victim].send(signal.SIGKILL)
            hold.release()
            codes = run.end()
        assert codes[victim] == KILLED
        assert codes[1 - victim] == EXIT_RESUMABLE
        (line,) = run.errors()
        told = steps_told(run.run_dir)
        assert_names(line, victim, told)
        lost.append(told - last_step(run.run_dir))
        assert_as_uninterrupted(run.run_dir, whole_dir)

    hold = Hold(tmp_path, told + EACH + 1)
    with Launched(tmp_path, data, *options, launcher=deepspeed_launcher(), hold=hold) as launched:
        launched.wait_for(lambda: steps_told(run.run_dir) >= told + EACH)
        launched.send_rank(1, signal.SIGKILL)
        hold.release()
        code, errors = launched.end()
    assert code != 0
    assert len(errors) <= 1
    lost.append(steps_told(run.run_dir) - last_step(run.run_dir))

    with Run(tmp_path, data, *options) as run:
        run.assert_done()
    assert last_step(run.run_dir) == STEPS
    assert_as_uninterrupted(run.run_dir, whole_dir)
    assert max(lost) < 2 * CHECKPOINT_EVERY  # the last one may not have been on the disk yet
    record(
        fault="a rank dies",
        done="SIGKILL of rank 1, of rank 0, of rank 1 under deepspeed, and the same command again",
        runs=4,
        lost_steps=f"{min(lost)} to {max(lost)} (a checkpoint every {CHECKPOINT_EVERY} steps)",
        result="the other rank names it and ends with code 75; the end is the uninterrupted run's bit for bit",
    )
