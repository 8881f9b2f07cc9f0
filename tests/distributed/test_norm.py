"""Global batch norm on uneven ranks against torch's batch norm of the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.norm import GlobalBatchNorm1d, GlobalBatchNorm2d
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROWS = [3, 5, 1, 4]  # of each rank
CHANNELS = 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_the_concatenated_batch(world_size):
    run_ranks(check_everything, world_size)


def check_everything(rank):
    """In one start of the processes; a failed comparison is re-raised with its rank and its line."""
    check_two_dimensions(rank)
    check_one_dimension_without_offset(rank)
    check_large_mean_in_float32(rank)
    check_bfloat16_under_autocast(rank)
    check_evaluation_is_local(rank)
    check_empty_rank_is_refused(rank)


def check_two_dimensions(rank):
    for seed, memory_format in enumerate((torch.contiguous_format, torch.channels_last)):
        x, dy = (t.contiguous(memory_format=memory_format) for t in data((CHANNELS, 5, 3), torch.float64, seed))
        ours = GlobalBatchNorm2d(CHANNELS, momentum=0.3).double()
        theirs = nn.BatchNorm2d(CHANNELS, momentum=0.3).double()
        y = compare(rank, ours, theirs, x, dy, rtol=1e-12, atol=1e-12)
        assert y.is_contiguous(memory_format=memory_format)


def check_one_dimension_without_offset(rank):
    ours, theirs = GlobalBatchNorm1d(CHANNELS, bias=False).double(), nn.BatchNorm1d(CHANNELS).double()
    compare(rank, ours, theirs, *data((CHANNELS,), torch.float64), rtol=1e-12, atol=1e-12)
    ours, theirs = GlobalBatchNorm1d(CHANNELS, affine=False).double(), nn.BatchNorm1d(CHANNELS).double()
    compare(rank, ours, theirs, *data((CHANNELS,), torch.float64), rtol=1e-12, atol=1e-12)


def check_large_mean_in_float32(rank):
    """A mean of 100 standard deviations rounds x̂ by 100 fp32 ulps, and no more: not by their square."""
    x, dy = data((CHANNELS, 5, 3), torch.float32)
    x += 100
    ours, theirs = GlobalBatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS).double()
    compare(rank, ours, theirs, x, dy, rtol=1e-4, atol=1e-4)


def check_bfloat16_under_autocast(rank):
    """Input and gradient in bf16 (8 bits: half an ulp is 0.4 %), parameters and statistics in fp32."""
    x, dy = data((CHANNELS, 5, 3), torch.bfloat16)
    ours, theirs = GlobalBatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = compare(rank, ours, theirs, x, dy, rtol=1e-2, atol=2e-2)
    assert y.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32
    # What no bf16 number passed through is exact to fp32.
    torch.testing.assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-5, atol=1e-5)


def check_evaluation_is_local(rank):
    if rank == 0:  # would wait for the others if it communicated
        ours, theirs = GlobalBatchNorm1d(CHANNELS).eval(), nn.BatchNorm1d(CHANNELS).eval()
        x = torch.randn(4, CHANNELS)
        assert torch.equal(ours(x), theirs(x))


def check_empty_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"at least one row on every rank, got shape \(0, 6\) on rank {rank}"):
        GlobalBatchNorm1d(CHANNELS)(torch.empty(0, CHANNELS))


def data(shape, dtype, seed=0):
    """The whole batch and its upstream gradient, alike on every rank; channels of many means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(ROWS[: dist.get_world_size()])
    x, dy = torch.randn(2, rows, *shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(1, CHANNELS + 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (x * channel - channel).to(dtype), (dy + 1).to(dtype)


def compare(rank, ours, theirs, x, dy, **tolerance):
    """Two steps of `ours` on this rank's rows against `theirs`, in float64, on all rows."""
    world_size = dist.get_world_size()
    own = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    with torch.no_grad():
        for parameter in (ours.weight, ours.bias):
            if parameter is not None:
                parameter.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    theirs.load_state_dict(ours.state_dict(), strict=False)  # a missing γ or β stays 1 or 0
    for step in range(2):
        own_x = (x[own] + step).requires_grad_()
        all_x = (x + step).double().requires_grad_()
        y, expected = ours(own_x), theirs(all_x)
        y.backward(dy[own])
        expected.backward(dy.double())
        torch.testing.assert_close(y.double(), expected[own], **tolerance)
        torch.testing.assert_close(own_x.grad.double(), all_x.grad[own], **tolerance)
    for name, parameter in ours.named_parameters():
        dist.all_reduce(parameter.grad)  # each rank holds its rows' part of the sum
        expected_grad = theirs.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), expected_grad, **tolerance)
    for name, value in ours.named_buffers():
        torch.testing.assert_close(value.double(), theirs.get_buffer(name).double(), **tolerance)
        copies = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(copies, value)
        assert all(torch.equal(copy, value) for copy in copies), "running statistics drift apart"
    return y
