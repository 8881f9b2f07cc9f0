"""Global batch norm on a GPU: against torch's batch norm in float64, and two ranks against the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.norm import GlobalBatchNorm1d, GlobalBatchNorm2d, GlobalBatchNorm3d
from model.norm_functions import batch_norm_over_ranks
from tests.distributed.ranks import run_ranks
from tests.gpu.waiting import no_waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Half an ulp of the result on values up to 8, and what statistics of 1,000 values add.
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
SHAPES = {
    "rows": ((97, 40), torch.contiguous_format),
    "NCHW": ((6, 40, 13, 11), torch.contiguous_format),
    "NHWC": ((6, 40, 13, 11), torch.channels_last),
    "NHWC, odd": ((6, 41, 13, 11), torch.channels_last),
    "pooled": ((64, 40, 1, 1), torch.channels_last),
    "NDHWC": ((6, 40, 5, 4, 3), torch.channels_last_3d),
}


def batch(shape, memory_format, dtype):
    """x and dy in `dtype`; channels of many means and spreads."""
    generator = torch.Generator("cuda").manual_seed(1)
    x, dy = torch.randn(2, *shape, generator=generator, device="cuda", dtype=torch.float64)
    channel = torch.linspace(0.5, 2, shape[1], device="cuda", dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return tuple(t.to(dtype).contiguous(memory_format=memory_format) for t in (x * channel - channel, dy + 0.5))


def float64_twin(dim, channels, **options):
    norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dim](channels, **options).cuda().double()
    if norm.affine:
        generator = torch.Generator("cuda").manual_seed(2)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2, generator=generator)
    return norm


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_rank_is_torchs(shape, dtype, options):
    """The kernels, without a wait for them; parameters stay in fp32 (fp64 for fp64) where the input is shorter."""
    shape, memory_format = SHAPES[shape]
    theirs = float64_twin(len(shape), shape[1], **options)
    x, dy = batch(shape, memory_format, dtype)
    kept = torch.promote_types(dtype, torch.float32)
    own = {name: t.detach().to(kept) for name, t in theirs.state_dict().items() if t.is_floating_point()}
    weight, bias = (own[name].requires_grad_() if name in own else None for name in ("weight", "bias"))
    running_mean, running_var = own.get("running_mean"), own.get("running_var")
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    with no_waiting():
        y = batch_norm_over_ranks(x, weight, bias, running_mean, running_var, momentum=0.1, eps=1e-5, group=None)
        y.backward(dy)
    expected = theirs(x64)
    expected.backward(dy.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    tolerance = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype], "check_dtype": False}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(x.grad, x64.grad, **tolerance)
    exact = {"rtol": ROUNDING[kept], "atol": ROUNDING[kept], "check_dtype": False}  # no short number in these
    if options.get("affine", True):
        sums = {**exact, "atol": ROUNDING[kept] * 100}  # of up to a thousand terms
        torch.testing.assert_close(weight.grad, theirs.weight.grad, **sums)
        torch.testing.assert_close(bias.grad, theirs.bias.grad, **sums)
    if running_mean is not None:
        torch.testing.assert_close(running_mean, theirs.running_mean, **exact)
        torch.testing.assert_close(running_var, theirs.running_var, **exact)


@pytest.mark.distributed
def test_two_ranks_are_the_concatenated_batch():
    run_ranks(check_two_ranks, 2)


def check_two_ranks(rank):
    """Gloo carries CUDA tensors, so that two ranks may share one GPU; uneven rows, none included."""
    ours = {2: GlobalBatchNorm1d, 4: GlobalBatchNorm2d, 5: GlobalBatchNorm3d}
    for shape, memory_format in SHAPES.values():
        for dtype, rounding in ROUNDING.items():
            for first in (0, 1, shape[0] // 3):
                own = slice(0, first) if rank == 0 else slice(first, None)
                x, dy = batch(shape, memory_format, dtype)
                theirs = float64_twin(len(shape), shape[1])
                norm = ours[len(shape)](shape[1]).cuda().to(torch.promote_types(dtype, torch.float32))
                norm.load_state_dict(theirs.state_dict())
                own_x, x64 = x[own].detach().requires_grad_(), x.double().requires_grad_()
                y, expected = norm(own_x), theirs(x64)
                y.backward(dy[own])
                expected.backward(dy.double())
                tolerance = {"rtol": rounding, "atol": rounding, "check_dtype": False}
                torch.testing.assert_close(y, expected[own], **tolerance)
                torch.testing.assert_close(own_x.grad, x64.grad[own], **tolerance)
                exact = min(rounding, ROUNDING[torch.float32])
                for name, parameter in norm.named_parameters():
                    total = parameter.grad.double()
                    dist.all_reduce(total)
                    expected_grad = theirs.get_parameter(name).grad
                    torch.testing.assert_close(total, expected_grad, rtol=exact, atol=100 * exact)
                for name, value in norm.named_buffers():
                    expected_value = theirs.get_buffer(name)
                    torch.testing.assert_close(value, expected_value, rtol=exact, atol=exact, check_dtype=False)
