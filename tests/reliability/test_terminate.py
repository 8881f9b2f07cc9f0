"""SIGTERM and SIGINT, to whomever: a checkpoint of that very step, an exit code that says so, and the same run."""

import signal

import pytest

from tests.reliability.forked import Run
from tests.reliability.held import Hold
from tests.reliability.launched import Launched, deepspeed_launcher, torchrun
from tests.reliability.record import record
from tests.reliability.whole_run import OPTIONS, STEPS, assert_as_uninterrupted, last_step, steps_told, whole_run
from train.cli import EXIT_INTERRUPTED, EXIT_RESUMABLE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

EACH = 3  # steps between two signals


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def steps_ahead(folder):
    """A step, and the `Hold` that stops a run there."""
    step = steps_told(folder / "run") + EACH
    return step, Hold(folder, step)


def assert_stopped(run_dir, whole_dir, errors, name):
    """Nothing is lost; the line tells the step."""
    step = last_step(run_dir)
    assert errors == [f"error: stopped by {name} after step {step}, with a checkpoint; the same command goes on"]
    assert steps_told(run_dir) == step
    assert_as_uninterrupted(run_dir, whole_dir)


def check_ranks(data, whole_dir, folder, number, receivers, code):
    """Without a launcher, `receivers` take the signal."""
    step, hold = steps_ahead(folder)
    with Run(folder, data, *OPTIONS, hold=hold) as run:
        run.wait_for(lambda: steps_told(run.run_dir) >= step - 1)
        for rank in receivers:
            run.ranks[rank].send(number)
        hold.release()
        assert run.end() == [code, code]
    assert_stopped(run.run_dir, whole_dir, run.errors(), signal.Signals(number).name)


def check_launcher(data, whole_dir, folder, launcher, send):
    """Under a launcher; a signal to rank 0 lets it go. Returns the launcher's exit code."""
    step, hold = steps_ahead(folder)
    with Launched(folder, data, *OPTIONS, launcher=launcher, hold=hold) as run:
        run.wait_for(lambda: hold.reached(step))
        send(run, hold)
        code, errors = run.end()
    assert_stopped(run.run_dir, whole_dir, errors, "SIGTERM")
    return code


def signal_rank_1(run, hold):
    run.send_rank(1, signal.SIGTERM)
    hold.release()


def test_a_signal_to_anyone_stops_the_run_with_a_checkpoint_of_that_step(whole, tmp_path):
    data, whole_dir = whole
    check_ranks(data, whole_dir, tmp_path, signal.SIGTERM, (0, 1), EXIT_RESUMABLE)
    check_ranks(data, whole_dir, tmp_path, signal.SIGTERM, (1,), EXIT_RESUMABLE)
    check_ranks(data, whole_dir, tmp_path, signal.SIGINT, (0, 1), EXIT_INTERRUPTED)

    code = check_launcher(data, whole_dir, tmp_path, torchrun(), lambda run, _: run.process.terminate())
    assert code != 0  # torchrun's own; that of its ranks is in its report
    code = check_launcher(data, whole_dir, tmp_path, deepspeed_launcher(), signal_rank_1)
    assert code == EXIT_RESUMABLE

    with Run(tmp_path, data, *OPTIONS) as run:
        run.assert_done()
    assert last_step(run.run_dir) == STEPS
    assert_as_uninterrupted(run.run_dir, whole_dir)
    record(
        fault="SIGTERM, SIGINT",
        done="to both ranks, to one rank alone, to torchrun alone, to one rank under deepspeed; Ctrl-C",
        runs=6,
        lost_steps=0,
        result="a checkpoint of that very step, exit code 75 (Ctrl-C: 130); the end is the uninterrupted run's bit for "
        "bit",
    )
