"""Global batch norm in one process is torch's batch norm; several ranks are tested in tests/distributed."""

import pytest
import torch
from torch import nn

from model.norm import GlobalBatchNorm1d, GlobalBatchNorm2d

CASES = [
    (GlobalBatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (GlobalBatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 3)),
]


@pytest.mark.parametrize(("ours", "theirs", "shape"), CASES)
def test_equals_torch_in_training_and_evaluation(ours, theirs, shape):
    norm, expected = ours(5, eps=1e-3, momentum=0.2), theirs(5, eps=1e-3, momentum=0.2)
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


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"GlobalBatchNorm2d takes \[N, C, H, W\], got shape \(2, 5\)"):
        GlobalBatchNorm2d(5)(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"GlobalBatchNorm1d takes \[N, C\], got shape \(2, 5, 1, 1\)"):
        GlobalBatchNorm1d(5)(torch.ones(2, 5, 1, 1))
