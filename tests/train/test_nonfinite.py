"""What is not finite is named by rank and step, and holds the optimizer back."""

import logging
import math

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from train.cli import RunFailed
from train.nonfinite import FINE, GRADIENT, INFINITE, LOSS, MAX_SKIPPED_IN_A_ROW, NAN, NonFiniteGuard, _blame
from train.runtime import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
CPU = torch.device("cpu")
SOUND = [torch.ones(3, 2), torch.ones(3, 2)]


def look(guard, z, loss, step, gradients=()):
    guard.observe(z, loss)
    guard.conclude(list(gradients), step)


def projections(value):
    broken = torch.ones(3, 2)
    broken[1, 0] = value
    return [torch.ones(3, 2), broken]


@pytest.mark.parametrize(
    ("z", "loss", "found"),
    [
        (projections(math.nan), 1.0, "rank 0 had NaN in the projections"),
        (projections(-math.inf), math.nan, "rank 0 had an infinity in the projections"),
        (SOUND, math.inf, "rank 0 had finite projections and a loss that is not"),
    ],
)
def test_the_first_such_step_stops_the_run(z, loss, found):
    guard = NonFiniteGuard("raise", ALONE, CPU)
    look(guard, SOUND, torch.tensor(1.0), 6)
    guard.check()
    assert not guard.skip
    look(guard, z, torch.tensor(loss), 7)
    assert guard.skip
    look(guard, SOUND, torch.tensor(1.0), 8)  # where nobody looked in between, as on a GPU
    assert guard.skip, "nothing may move after the first such step"
    with pytest.raises(RunFailed, match=f"^step 7 is not finite: {found}. The optimizer has not moved since; lower"):
        guard.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts(value):
    guard = NonFiniteGuard("raise", ALONE, CPU)
    sound = [torch.full((3,), 1e30), torch.ones(2)]  # whose squares float32 could not hold
    look(guard, SOUND, torch.tensor(1.0), 1, sound)
    guard.check()
    look(guard, SOUND, torch.tensor(1.0), 2, [*sound, torch.tensor([1.0, value])])
    assert guard.skip
    with pytest.raises(RunFailed, match=r"^step 2 is not finite: losses are finite, the gradient is not"):
        guard.check()


def test_skip_leaves_such_steps_out_and_says_so_once(caplog):
    guard = NonFiniteGuard("skip", ALONE, CPU)
    skipped = []
    for step, value in enumerate((1.0, math.nan, 1.0, math.inf, 1.0), start=1):
        look(guard, projections(value), torch.tensor(value), step)
        skipped.append(guard.skip.item())
    assert skipped == [False, True, False, True, False]
    with caplog.at_level(logging.WARNING):
        guard.check()
        guard.check()
    assert caplog.messages == ["steps left out so far: 2; the first was step 2: rank 0 had NaN in the projections"]


def test_a_run_that_only_skips_is_stopped():
    guard = NonFiniteGuard("skip", ALONE, CPU)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        look(guard, projections(math.nan), torch.tensor(math.nan), step)
    guard.check()
    look(guard, SOUND, torch.tensor(1.0), 100)
    for step in range(101, 101 + MAX_SKIPPED_IN_A_ROW):
        look(guard, projections(math.nan), torch.tensor(math.nan), step)
    with pytest.raises(RunFailed, match="the last 100 steps were not finite and left out; the first was step 1: "):
        guard.check()


@pytest.mark.distributed
def test_all_ranks_name_the_one_to_blame():
    run_ranks(check_three_ranks, 3)


def check_three_ranks(rank):
    """Rank 1's NaN makes everyone's loss NaN, and is the only one to blame."""
    guard = NonFiniteGuard("raise", Ranks(rank=rank, world_size=3, local_rank=rank, local_world_size=3), CPU)
    look(guard, SOUND, torch.tensor(1.0), 1)
    guard.check()
    look(guard, projections(math.nan) if rank == 1 else SOUND, torch.tensor(math.nan), 2)
    assert guard.skip
    with pytest.raises(RunFailed, match=r"^step 2 is not finite: rank 1 had NaN in the projections\. The"):
        guard.check()
    dist.barrier()


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([NAN, NAN, NAN], "every rank had NaN in the projections"),
        (
            [FINE, NAN, NAN, INFINITE],
            "ranks 1, 2 had NaN in the projections; rank 3 had an infinity in the projections",
        ),
        ([LOSS], "rank 0 had finite projections and a loss that is not"),
        ([FINE, GRADIENT, FINE], "losses are finite, the gradient is not"),
    ],
)
def test_the_words_for_it(found, text):
    assert _blame(found) == text


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    from tests.gpu.waiting import no_waiting

    device = torch.device("cuda")
    guard = NonFiniteGuard("raise", ALONE, device)
    z = [value.to(device) for value in projections(math.nan)]
    loss = torch.tensor(1.0, device=device)
    with no_waiting():
        look(guard, z, loss, 1, z)
    assert guard.skip
