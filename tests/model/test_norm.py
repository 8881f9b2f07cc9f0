"""Global batch norm in one process is torch's batch norm; several ranks are tested in tests/distributed."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from model.norm import (
    GlobalBatchNorm,
    GlobalBatchNorm1d,
    GlobalBatchNorm2d,
    GlobalBatchNorm3d,
    check_group_size,
    convert,
    groups_of,
    set_group,
)
from train.optim.param_groups import param_groups

CASES = [
    (GlobalBatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (GlobalBatchNorm1d, nn.BatchNorm1d, (6, 5, 7)),
    (GlobalBatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 3)),
    (GlobalBatchNorm3d, nn.BatchNorm3d, (4, 5, 3, 3, 2)),
    (GlobalBatchNorm, nn.BatchNorm2d, (4, 5, 3, 3)),
]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), CASES)
def test_equals_torch_in_training_and_evaluation(ours, theirs, shape, options):
    norm, expected = ours(5, eps=1e-3, **options), theirs(5, eps=1e-3, **options)
    with torch.no_grad():
        expected.weight.uniform_(0.5, 2)
        expected.bias.normal_()
    norm.load_state_dict(expected.state_dict())  # strict: the same keys
    x = torch.randn(shape)
    for training in (True, True, False):
        norm.train(training)
        expected.train(training)
        assert torch.equal(norm(x), expected(x))
    for name, value in expected.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name


@pytest.mark.parametrize(("ours", "theirs", "shape"), CASES)
def test_scale_without_offset(ours, theirs, shape):
    norm, expected = ours(5, bias=False), theirs(5)
    assert "bias" not in norm.state_dict()
    assert torch.equal(norm(x := torch.randn(shape)), expected(x))
    with torch.no_grad():
        norm.weight.zero_()
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(5))
    assert torch.equal(norm.running_mean, torch.zeros(5))
    assert norm.num_batches_tracked == 0
    assert not dict(ours(5, affine=False).named_parameters())


@pytest.mark.parametrize(
    ("norm", "shape", "message"),
    [
        (GlobalBatchNorm1d, (2, 5, 1, 1), r"GlobalBatchNorm1d takes \[N, C\] or \[N, C, L\] with C = 5"),
        (GlobalBatchNorm2d, (2, 5), r"GlobalBatchNorm2d takes \[N, C, H, W\] with C = 5, .* got shape \(2, 5\)"),
        (GlobalBatchNorm2d, (2, 4, 1, 1), r"with C = 5, of a floating dtype, got shape \(2, 4, 1, 1\)"),
        (GlobalBatchNorm3d, (2, 5, 1, 1), r"takes \[N, C, D, H, W\] with C = 5"),
        (GlobalBatchNorm, (5,), r"takes \[N, C\] or .* or \[N, C, D, H, W\] with C = 5, .* got shape \(5,\)"),
    ],
)
def test_shapes_are_checked(norm, shape, message):
    with pytest.raises(ValueError, match=message):
        norm(5)(torch.ones(shape))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"of a floating dtype, got shape \(2, 5\) of torch.int64"):
        GlobalBatchNorm1d(5)(torch.ones(2, 5, dtype=torch.int64))


def test_convert_changes_the_class_and_nothing_else():
    shared = nn.BatchNorm1d(4, momentum=None)
    net = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(4, eps=0.5, momentum=0.25, affine=False),
            "frozen": nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
            "cube": nn.BatchNorm3d(4),
            "sync": nn.SyncBatchNorm(4),
            "once": shared,
            "twice": shared,
            "already": GlobalBatchNorm2d(4),
            "instance": nn.InstanceNorm2d(4),
            "linear": nn.Linear(4, 4),
        }
    )
    calls = []
    net["plain"].register_forward_hook(lambda module, inputs, output: calls.append(module))
    before = {name: (module, dict(module.__dict__)) for name, module in net.named_modules()}
    tensors = [*net.named_parameters(), *net.named_buffers()]
    assert convert(net) is net
    after = [*net.named_parameters(), *net.named_buffers()]
    assert all(ours is theirs for (_, ours), (_, theirs) in zip(after, tensors, strict=True))
    for name, module in net.named_modules():
        same, attributes = before[name]
        assert module is same
        attributes.pop("process_group", None)
        assert {key: module.__dict__[key] for key in attributes} == attributes, name
    classes = {name: type(module) for name, module in net.items()}
    assert classes == {
        "plain": GlobalBatchNorm1d,
        "frozen": nn.Sequential,
        "cube": GlobalBatchNorm3d,
        "sync": GlobalBatchNorm,
        "once": GlobalBatchNorm1d,
        "twice": GlobalBatchNorm1d,
        "already": GlobalBatchNorm2d,
        "instance": nn.InstanceNorm2d,
        "linear": nn.Linear,
    }
    assert type(net["frozen"][0]) is GlobalBatchNorm2d
    assert not net["frozen"][0].training
    net["plain"](torch.randn(3, 4))
    assert calls == [net["plain"]]
    assert type(convert(nn.BatchNorm2d(3))) is GlobalBatchNorm2d


def test_converted_network_gives_what_it_gave():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    ours = convert(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    groups = [param_groups(net, weight_decay=1e-4) for net in (ours, theirs)]
    assert groups[0][0]["param_names"] == groups[1][0]["param_names"]
    assert groups[0][1]["param_names"] == groups[1][1]["param_names"]


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input.relu())


@pytest.mark.parametrize("norm", [OwnNorm(4), nn.LazyBatchNorm2d()], ids=["subclass", "lazy"])
def test_convert_refuses_what_it_does_not_know_and_changes_nothing(norm):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(norm))
    message = (
        rf"`1.0` must be one of torch's BatchNorm1d, .*, SyncBatchNorm to be converted, got {type(norm).__name__};"
    )
    with pytest.raises(ValueError, match=message):
        convert(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_lazy_norms_can_be_converted_once_they_ran():
    net = nn.Sequential(nn.LazyBatchNorm2d())
    net(torch.randn(2, 4, 3, 3))
    assert type(convert(net)[0]) is GlobalBatchNorm2d


def test_groups_without_process_groups():
    assert groups_of(0) is None
    assert groups_of(1) is None
    with pytest.raises(ValueError, match=r"`model.norm_group_size` must divide the world size 1, got 2; use 1, or 0"):
        groups_of(2)
    set_group(GlobalBatchNorm1d(4), None)
    with pytest.raises(ValueError, match="Linear holds no global batch norm; use convert"):
        set_group(nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    ("size", "world_size", "nearest"),
    [(3, 8, "2 or 4"), (-1, 8, "1"), (16, 8, "8"), (5, 12, "4 or 6"), (2, 7, "1 or 7")],
)
def test_group_sizes_divide_the_world(size, world_size, nearest):
    message = f"must divide the world size {world_size}, got {size}; use {nearest}, or 0 for all ranks"
    with pytest.raises(ValueError, match=message):
        check_group_size(size, world_size)
    for fine in (0, 1, world_size):
        check_group_size(fine, world_size)
