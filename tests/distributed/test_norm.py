"""Global batch norm on uneven ranks against torch's batch norm of the concatenated batch."""

import copy
import itertools
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.profiler import profile

from benchmarks.peers.norm_forms import GatheredBatchNorm2d, ReducedBatchNorm2d
from model import norm_cuda, norm_functions
from model.norm import (
    GlobalBatchNorm,
    GlobalBatchNorm1d,
    GlobalBatchNorm2d,
    GlobalBatchNorm3d,
    convert,
    groups_of,
    set_group,
)
from tests.distributed import cuda_norm_kernels
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROWS = [3, 5, 1, 4]  # of each rank
CHANNELS = 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_the_concatenated_batch(world_size):
    run_ranks(check_everything, world_size)


def check_everything(rank):
    """In one start of the processes; a failed comparison is re-raised with its rank and its line."""
    check_two_dimensions(rank)
    check_other_dimensions(rank)
    check_layouts(rank)
    check_options(rank)
    check_large_mean_in_float32(rank)
    check_bfloat16_under_autocast(rank)
    check_bfloat16_parameters(rank)
    check_evaluation_is_local(rank)
    check_one_collective_each_way(rank)
    check_ranks_without_rows(rank)
    check_too_few_values(rank)
    check_compiled(rank)
    check_converted_resnet18(rank)
    check_peers_of_the_benchmark(rank)
    if dist.get_world_size() == 4:
        check_groups(rank)
    check_the_way_on_cuda(rank)


def check_two_dimensions(rank):
    for seed, memory_format in enumerate((torch.contiguous_format, torch.channels_last)):
        x, dy = (t.contiguous(memory_format=memory_format) for t in data((CHANNELS, 5, 3), torch.float64, seed))
        ours = GlobalBatchNorm2d(CHANNELS, momentum=0.3).double()
        theirs = nn.BatchNorm2d(CHANNELS, momentum=0.3).double()
        y = compare(rank, ours, theirs, x, dy, **EXACT)
        assert y.is_contiguous(memory_format=memory_format)


def check_other_dimensions(rank):
    for ours, theirs, positions in (
        (GlobalBatchNorm1d, nn.BatchNorm1d, ()),
        (GlobalBatchNorm1d, nn.BatchNorm1d, (4,)),
        (GlobalBatchNorm3d, nn.BatchNorm3d, (2, 3, 2)),
        (GlobalBatchNorm, nn.BatchNorm2d, (1, 1)),
    ):
        x, dy = data((CHANNELS, *positions), torch.float64)
        compare(rank, ours(CHANNELS).double(), theirs(CHANNELS).double(), x, dy, **EXACT)


def check_layouts(rank):
    """Rows, channels or positions with gaps between them; a gradient in another layout; one that is expanded."""
    x, dy = data((CHANNELS, 5, 3), torch.float64)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat((channels_last, channels_last), dim=1).contiguous(memory_format=torch.channels_last)
    for strange in (torch.stack((x, x), dim=-1)[..., 0], wide[:, :CHANNELS], channels_last, x.transpose(2, 3)):
        upstream = dy.expand_as(strange) if strange.shape == dy.shape else dy.transpose(2, 3)
        theirs = nn.BatchNorm2d(CHANNELS).double()
        compare(rank, GlobalBatchNorm2d(CHANNELS).double(), theirs, strange, upstream, **EXACT)
    ones = torch.ones((), dtype=torch.float64).expand_as(dy)
    compare(rank, GlobalBatchNorm2d(CHANNELS).double(), nn.BatchNorm2d(CHANNELS).double(), x, ones, **EXACT)


def check_options(rank):
    x, dy = data((CHANNELS,), torch.float64)
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}):
        ours, theirs = (norm(CHANNELS, **options).double() for norm in (GlobalBatchNorm1d, nn.BatchNorm1d))
        compare(rank, ours, theirs, x, dy, **EXACT)
    ours, theirs = GlobalBatchNorm1d(CHANNELS, bias=False).double(), nn.BatchNorm1d(CHANNELS).double()
    compare(rank, ours, theirs, x, dy, **EXACT)


def check_large_mean_in_float32(rank):
    """A mean of 100 standard deviations rounds x̂ by 100 fp32 ulps, and no more: not by their square."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, dy = data((CHANNELS, 5, 3), torch.float32)
        x = (x + 100).contiguous(memory_format=memory_format)
        dy = dy.contiguous(memory_format=memory_format)
        ours, theirs = GlobalBatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS).double()
        # The mean's last bits (torch's kernel leaves two or three ulps of 100) shift all x̂ of a sum alike.
        compare(rank, ours, theirs, x, dy, rtol=1e-4, atol=1e-4, sums_atol=2 * len(x) * 15 * 3 * 100 * 2**-23)


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


def check_bfloat16_parameters(rank):
    """A module wholly in bf16 still computes its statistics in fp32; its gradients come in bf16."""
    x, dy = data((CHANNELS, 5, 3), torch.bfloat16)
    ours, theirs = GlobalBatchNorm2d(CHANNELS).bfloat16(), nn.BatchNorm2d(CHANNELS).double()
    compare(rank, ours, theirs, x, dy, rtol=2e-2, atol=4e-2)
    assert ours.weight.grad.dtype == torch.bfloat16


def check_evaluation_is_local(rank):
    if rank == 0:  # would wait for the others if it communicated
        for track in (True, False):
            ours, theirs = (
                norm(CHANNELS, track_running_stats=track).eval() for norm in (GlobalBatchNorm1d, nn.BatchNorm1d)
            )
            x = torch.randn(4, CHANNELS)
            assert torch.equal(ours(x), theirs(x))


def check_one_collective_each_way(rank):
    norm = GlobalBatchNorm2d(CHANNELS)
    with profile() as forward:
        y = norm(torch.randn(2, CHANNELS, 3, 3, requires_grad=True))
    with profile() as backward:
        y.sum().backward()
    for profiler in (forward, backward):
        names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
        assert names == ["gloo:all_reduce"], f"rank {rank}: {names}"


def check_ranks_without_rows(rank):
    for empty in (0, 1):
        rows = [0 if i == empty else n for i, n in enumerate(ROWS)]
        x, dy = data((CHANNELS, 2, 3), torch.float64)
        ours, theirs = GlobalBatchNorm2d(CHANNELS).double(), nn.BatchNorm2d(CHANNELS).double()
        compare(rank, ours, theirs, x, dy, rows=rows, **EXACT)


def check_too_few_values(rank):
    """Every rank learns it."""
    for rows in ([0, 0, 0, 0], [0, 1, 0, 0]):
        x = torch.zeros(rows[rank], CHANNELS)
        message = (
            rf"needs at least 2 values of a channel over its {dist.get_world_size()} ranks, got {sum(rows)}; "
            rf"shape \({rows[rank]}, 6\) on rank {rank}"
        )
        with pytest.raises(ValueError, match=message):
            GlobalBatchNorm1d(CHANNELS)(x)


def check_the_way_on_cuda(rank):
    """What surrounds the CUDA kernels, around the definitions of these."""
    cuda_norm_kernels.register()
    with patch.object(norm_functions, "norm_anywhere", norm_cuda):
        check_two_dimensions(rank)
        check_other_dimensions(rank)
        check_layouts(rank)
        check_options(rank)
        check_large_mean_in_float32(rank)
        check_bfloat16_under_autocast(rank)
        check_bfloat16_parameters(rank)
        check_ranks_without_rows(rank)


def check_compiled(rank):
    """Under torch.compile a layer that communicates runs as it stands, between compiled graphs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, CHANNELS), GlobalBatchNorm1d(CHANNELS), nn.Tanh(), nn.Linear(CHANNELS, 2))
    x = torch.randn(3 + rank, 4, generator=torch.Generator().manual_seed(rank))
    results = []
    for form in (copy.deepcopy(net), torch.compile(copy.deepcopy(net), backend="aot_eager")):
        y = form(x)
        y.square().sum().backward()
        results.append((y.detach(), [parameter.grad for parameter in form.parameters()], list(form.buffers())))
    torch.testing.assert_close(results[1], results[0])


def check_groups(rank):
    with pytest.raises(ValueError, match=r"`model.norm_group_size` must divide the world size 4, got 3; use 2 or 4"):
        groups_of(3)
    for size in (0, 4):
        assert groups_of(size) is None
    pairs, alone = groups_of(2), groups_of(1)
    assert dist.get_process_group_ranks(pairs) == [[0, 1], [2, 3]][rank // 2]
    assert dist.get_process_group_ranks(alone) == [rank]
    patient = groups_of(2, timedelta(hours=3))._get_backend(torch.device("cpu"))
    assert patient.options._timeout == timedelta(hours=3)

    x, dy = data((CHANNELS, 5, 3), torch.float64)
    members = slice(0, sum(ROWS[:2])) if rank < 2 else slice(sum(ROWS[:2]), None)
    rows = ROWS[:2] if rank < 2 else ROWS[2:]
    net = nn.Sequential(GlobalBatchNorm2d(CHANNELS)).double()
    set_group(net, pairs)
    theirs = nn.BatchNorm2d(CHANNELS).double()
    compare(rank % 2, net[0], theirs, x[members], dy[members], rows=rows, group=pairs, **EXACT)
    copied = copy.deepcopy(net)  # a moving average's
    assert copied[0].group is pairs
    assert torch.equal(copied[0].weight, net[0].weight)
    assert copied[0].weight is not net[0].weight

    set_group(net, alone)
    own = x[sum(ROWS[:rank]) : sum(ROWS[: rank + 1])]
    assert torch.equal(net(own), theirs(own))  # γ and β are alike since `compare`
    set_group(net, None)
    net[0].reset_running_stats()
    compare(rank, net[0], nn.BatchNorm2d(CHANNELS).double(), x, dy, **EXACT)

    foreign = dist.new_group([0])
    if rank != 0:
        with pytest.raises(ValueError, match=rf"rank {rank} is not in the group"):
            set_group(net, foreign)
    synced = convert(nn.Sequential(nn.SyncBatchNorm(CHANNELS, process_group=pairs)))
    assert synced[0].group is pairs


def check_converted_resnet18(rank):
    """All ranks' images in one process against each rank's own, torchvision's network in both cases."""
    rows = [3, 2, 1, 4][: dist.get_world_size()]
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    expected, expected_buffers = resnet18_step(torchvision.models.resnet18(), slice(0, sum(rows)))
    gradients, buffers = resnet18_step(convert(torchvision.models.resnet18()), own)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(buffers, expected_buffers, rtol=1e-9, atol=1e-9)


def check_peers_of_the_benchmark(rank):
    """They compute the same, in fp32 (but for the running variance, which both leave biased)."""
    generator = torch.Generator().manual_seed(6)
    x, dy = torch.randn(2, 3 * dist.get_world_size(), CHANNELS, 4, 5, generator=generator)
    own = slice(3 * rank, 3 * rank + 3)
    expected_x = x.clone().requires_grad_()
    expected = nn.BatchNorm2d(CHANNELS)(expected_x)
    expected.backward(dy)
    for peer in (ReducedBatchNorm2d, GatheredBatchNorm2d):
        own_x = x[own].clone().requires_grad_()
        y = peer(CHANNELS)(own_x)
        y.backward(dy[own])
        torch.testing.assert_close(y, expected[own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_x.grad, expected_x.grad[own], rtol=1e-5, atol=1e-5)


def resnet18_step(net, own):
    """The gradients of a sum over the images `own` of ten, and the buffers, in float64."""
    generator = torch.Generator().manual_seed(3)
    net = net.double().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for value in itertools.chain(net.parameters(), (b for b in net.buffers() if b.is_floating_point())):
            value.copy_(0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64) + (value.ndim == 1))
    images = torch.randn(10, 3, 33, 33, generator=generator, dtype=torch.float64)
    weights = torch.randn(10, 1000, generator=generator, dtype=torch.float64)
    (net(images[own]) * weights[own]).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}, dict(net.named_buffers())


def data(shape, dtype, seed=0):
    """The whole batch and its upstream gradient, alike on every rank; channels of many means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(ROWS[: dist.get_world_size()])
    x, dy = torch.randn(2, rows, *shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(1, CHANNELS + 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (x * channel - channel).to(dtype), (dy + 1).to(dtype)


def compare(rank, ours, theirs, x, dy, *, rows=ROWS, group=None, sums_atol=None, **tolerance):
    """Two steps of `ours` on this rank's rows against `theirs`, in float64, on those of all ranks in `group`."""
    world_size = dist.get_world_size(group)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    everyone = slice(0, sum(rows[:world_size]))
    with torch.no_grad():
        for parameter in (ours.weight, ours.bias):
            if parameter is not None:
                parameter.grad = None
                parameter.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    theirs.load_state_dict(ours.state_dict(), strict=False)  # a missing γ or β stays 1 or 0
    for step in range(2):
        all_x = (x[everyone] + step).double().requires_grad_()
        own_x = (x + step)[own].detach().requires_grad_()
        y, expected = ours(own_x), theirs(all_x)
        y.backward(dy[own])
        expected.backward(dy[everyone].double())
        torch.testing.assert_close(y.double(), expected[own], **tolerance)
        torch.testing.assert_close(own_x.grad.double(), all_x.grad[own], **tolerance)
    of_sums = tolerance if sums_atol is None else {"rtol": 0, "atol": sums_atol}
    for name, parameter in ours.named_parameters():
        total = parameter.grad.double()
        dist.all_reduce(total, group=group)  # each rank holds its rows' part of the sum
        torch.testing.assert_close(total, theirs.get_parameter(name).grad, **of_sums)
    for name, value in ours.named_buffers():
        torch.testing.assert_close(value.double(), theirs.get_buffer(name).double(), **tolerance)
        copies = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(copies, value, group=group)
        assert all(torch.equal(copy, value) for copy in copies), "running statistics drift apart"
    return y
