"""LARS over one flat partition in one process: pieces, padding, what is refused."""

import pytest
import torch

from tests.train.flat_partitions import PADDING, TOLERANCES, check_parts, expected_run, partition_run, starts_and_grads
from tests.train.lars_cases import VARIANTS
from train.optim.lars import LARS
from train.optim.stretches import Piece


@pytest.mark.parametrize(("form", "nesterov"), VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_partition_is_the_whole_model(form, nesterov, dtype):
    starts, grads = starts_and_grads(dtype)
    borders = [(0, sum(x.numel() for x in tensors) + PADDING) for tensors in starts]
    parts = partition_run(starts, grads, form, nesterov, rank=0, borders=borders)
    check_parts([parts], expected_run(starts, grads, form, nesterov))


def test_a_skipped_step_leaves_partitions_as_they_are():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = LARS([param], lr=1.0)
    optimizer.partition({param: [Piece("a", 0, 0, 2), Piece("b", 1, 2, 2)]}, 2)
    param.grad = torch.full((5,), torch.nan)
    optimizer.skip = torch.tensor(True)
    optimizer.step()
    assert torch.equal(param.data, torch.ones(5))
    param.grad = torch.ones(5)
    optimizer.skip = torch.tensor(False)
    optimizer.step()
    assert torch.equal(param.data != 1, torch.tensor([True, True, True, True, False]))


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (Piece("a", 0, 3, 3), r"must lie within its partition of 5 elements"),
        (Piece("a", 0, -1, 3), r"must lie within its partition of 5 elements"),
        (Piece("a", 2, 0, 3), r"must have a tensor number below `num_tensors`, 2"),
    ],
)
def test_a_piece_out_of_its_place_is_refused(piece, words):
    param = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=words):
        LARS([param]).partition({param: [piece]}, 2)


def test_every_parameter_must_be_among_the_partitions():
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"^`pieces` must have the parameters of this optimizer as its keys, got 1 of 2$"
    ):
        LARS(params).partition({params[0]: [Piece("a", 0, 0, 5)]}, 1)
    with pytest.raises(ValueError, match="got 0 of 2, and 1 other"):
        LARS(params).partition({torch.ones(5): []}, 1)


def test_a_partition_must_be_flat():
    param = torch.nn.Parameter(torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"^a partition must be flat and contiguous, got shape \[5, 1\]$"):
        LARS([param]).partition({param: []}, 1)
