"""Streamed linear evaluation on two ranks: the heads of one process, and the same ones on both."""

import os
from shutil import rmtree

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.train.linear_cases import make_case, options
from train.evaluation.linear_choice import hold_out
from train.evaluation.linear_config import LinearConfig
from train.evaluation.linear_probe import Head
from train.evaluation.linear_training import LinearTraining

HEADS = [
    Head(base_lr=rate, weight_decay=decay, skips_held_out=skips)
    for rate, decay in ((0.5, 0.0), (4.0, 1e-2))
    for skips in (True, False)
]


def train(folder):
    training = LinearTraining(LinearConfig(**options(folder)))
    trained = training.train(HEADS, 2, hold_out(training.labels, 0.4, 0))
    return trained.heads.weight, trained.heads.bias, trained.losses, trained.unfinished


def train_on_rank(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    return train(folder)[:3]


@pytest.mark.distributed
def test_ranks_take_the_steps_of_one_process(tmp_path):
    make_case(tmp_path)
    weight, bias, losses, unfinished = train(tmp_path)
    rmtree(unfinished.folder)  # else the ranks would go on from it, and have nothing left to do
    for of_rank in run_ranks(train_on_rank, 2, tmp_path, timeout_s=240):
        torch.testing.assert_close(of_rank[0], weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_rank[1], bias, rtol=1e-5, atol=1e-6)
        assert of_rank[2] == pytest.approx(losses, rel=1e-5)
