"""A run that is stopped and goes on with other numbers of ranks, 2 → 1 → 4, is the same run to rounding."""

import signal

import pytest
import torch

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Run
from tests.reliability.held import Hold
from tests.reliability.processes import curve, last_state
from tests.reliability.record import record
from tests.reliability.whole_run import last_step, steps_told
from train.cli import EXIT_RESUMABLE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS = 20  # 4 epochs of 5 batches of 64
# As in tests/train/test_exact_runs.py, which says why: a low rate and not too small a network, lest rounding grow.
OPTIONS = ("--train.epochs=4", "--data.global_batch_size=64", "--model.encoder.width=0.5", "--optim.base_lr=0.03")
STATE = ("--train.ema_decay=0.9", "--online.linear_probe=true", "--train.zero_stage=1")
SAME = 1e-4  # of a loss of 5
STOPS = {2: 6, 1: 12}  # ranks: the step after which they are asked to stop, in the middle of an epoch


def test_a_run_goes_on_with_one_rank_and_with_four(tmp_path):
    data = make_beton(tmp_path, [(24, 20)] * 320, encode="raw").path
    whole_dir = tmp_path / "whole"
    whole_dir.mkdir()
    with Run(whole_dir, data, *OPTIONS, *STATE, world_size=1) as whole:
        whole.assert_done()
    for world_size, stop in STOPS.items():
        hold = Hold(tmp_path, stop)
        with Run(tmp_path, data, *OPTIONS, *STATE, world_size=world_size, hold=hold) as run:
            run.wait_for(lambda hold=hold, stop=stop: hold.reached(stop))
            run.send(signal.SIGTERM)
            assert run.end() == [EXIT_RESUMABLE] * world_size
        assert stop <= last_step(run.run_dir) == steps_told(run.run_dir) <= stop + 1
    with Run(tmp_path, data, *OPTIONS, *STATE, world_size=4) as run:
        run.assert_done()

    ours, theirs = curve(run.run_dir), curve(whole.run_dir)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "probe_loss"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=SAME)
    our_end, end = last_state(run.run_dir), last_state(whole.run_dir)
    for part in ("model", "average", "probe"):
        assert relative_distance(getattr(our_end, part), getattr(end, part)) < 1e-3
    record(
        fault="another number of ranks",
        done="SIGTERM on 2 ranks, resumed on 1, SIGTERM, resumed on 4; against 1 rank without interruption",
        runs=4,
        lost_steps=0,
        result=f"every loss within {SAME:g}, parameters, average and probe within 0.1 %",
    )


def relative_distance(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖ of all tensors together."""
    assert ours.keys() == theirs.keys()
    flat, expected = (torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs))
    return ((flat - expected).norm() / expected.norm()).item()
