"""SIGKILL of everything at any moment, as where power goes."""

import random
import signal
import time

import pytest

from tests.reliability.forked import KILLED, Run
from tests.reliability.held import Hold
from tests.reliability.launched import Launched, deepspeed_launcher, torchrun
from tests.reliability.record import record
from tests.reliability.whole_run import OPTIONS, STEPS, assert_as_uninterrupted, last_step, steps_told, whole_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

CHECKPOINT_EVERY = 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def test_killed_anywhere_the_run_goes_on_as_if_it_had_not_been(whole, tmp_path):
    data, whole_dir = whole
    moments = random.Random(20)
    options = (*OPTIONS, f"--train.checkpoint_every={CHECKPOINT_EVERY}")
    lost = []

    def start(kind, **launcher):
        """Returns a step that it will come to, and the run, which stands still some steps later."""
        step = steps_told(tmp_path / "run") + moments.randint(1, 7)
        return step, kind(tmp_path, data, *options, **launcher, hold=Hold(tmp_path, step + 7))

    def wait_and_kill(step, run, kill):
        run.wait_for(lambda: steps_told(run.run_dir) >= step)
        time.sleep(moments.uniform(0.0, 0.1))  # somewhere in a step
        kill()
        lost.append(steps_told(run.run_dir) - last_step(run.run_dir))
        if last_step(run.run_dir):
            assert_as_uninterrupted(run.run_dir, whole_dir)

    for launcher in (deepspeed_launcher(), torchrun()):
        step, launched = start(Launched, launcher=launcher)
        with launched as run:
            wait_and_kill(step, run, run.kill)
    for _ in range(3):
        step, run = start(Run)
        with run:
            wait_and_kill(step, run, lambda run=run: run.send(signal.SIGKILL))
            assert run.end() == [KILLED, KILLED]
    with Run(tmp_path, data, *options) as run:
        run.assert_done()
    assert last_step(run.run_dir) == STEPS
    assert_as_uninterrupted(run.run_dir, whole_dir)
    assert "resuming from" in (run.run_dir / "train.log").read_text()
    assert max(lost) < 2 * CHECKPOINT_EVERY  # the last one may not have been on the disk yet
    record(
        fault="SIGKILL of launcher and ranks",
        done=f"2 ranks with everything on (average, probe, micro-batches, ZeRO 2), killed {len(lost)} times at random "
        "moments, under deepspeed, under torchrun and without a launcher",
        runs=len(lost) + 1,
        lost_steps=f"{min(lost)} to {max(lost)} (a checkpoint every {CHECKPOINT_EVERY} steps)",
        result="parameters, optimizer, average, probe and metrics equal the uninterrupted run's bit for bit",
    )
