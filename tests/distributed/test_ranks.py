"""The helper itself: results in rank order, failures with the rank's name."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(rank, offset):
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, total


def fail_on_rank_1(rank, how):
    if rank == 1:
        if how == "exit":
            os._exit(3)
        raise KeyError("the cause")
    dist.barrier()


def test_results_stand_in_rank_order():
    assert run_ranks(sum_of_ranks, 2, 10) == [(0, torch.tensor(21)), (1, torch.tensor(21))]


def test_an_exception_names_its_rank():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*fail_on_rank_1.*KeyError: 'the cause'"):
        run_ranks(fail_on_rank_1, 2, "raise")


def test_a_dead_rank_is_named():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: terminated with exit code 3"):
        run_ranks(fail_on_rank_1, 2, "exit")
