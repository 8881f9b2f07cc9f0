"""The encoders against torchvision's and against the published parameter counts."""

import pytest
import torch
import torchvision
from torch import nn

from model.norm import GlobalBatchNorm2d
from model.resnet import EncoderConfig, ResNet, initialise_convolution

CIFAR_10 = EncoderConfig(depth=10, width=0.25, stem="cifar")


def torchvision_twin(depth, stem="imagenet"):
    """Ours and torchvision's (no `fc`) with the same weights and statistics, none of them trivial."""
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    theirs.fc = nn.Identity()
    if stem == "cifar":  # the usual change for 32² images
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    generator = torch.Generator().manual_seed(1)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point() and ("bn" in name or "downsample.1" in name):
            value.uniform_(0.5, 1.5, generator=generator)
    ours = ResNet(EncoderConfig(depth=depth, stem=stem))
    ours.load_state_dict(theirs.state_dict())  # strict
    return ours, theirs


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [(50, 1, 24), (50, 2, 94), (101, 1, 43), (101, 2, 170), (152, 1, 58), (152, 2, 233)],
)
def test_published_parameter_counts(depth, width, millions):
    """SimCLR v2, table 1, rows without selective kernels, in millions.

    What fits every row is the encoder's variables as TensorFlow counts them: convolutions, γ and β, and the
    running means and variances (without these 152, 2 would be 232); no classifier (with its 1000-way `fc`
    ResNet-50 has 25.6) and no projection head.
    """
    with torch.device("meta"):
        encoder = ResNet(EncoderConfig(depth=depth, width=width))
    counts = {name: value.numel() for name, value in encoder.state_dict().items()}
    total = sum(count for name, count in counts.items() if not name.endswith("num_batches_tracked"))
    assert round(total / 1e6) == millions
    assert encoder.feature_dim == 2048 * width


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_keys_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        ours = ResNet(EncoderConfig(depth=depth)).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    del theirs["fc.weight"], theirs["fc.bias"]
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(("depth", "stem"), [(18, "imagenet"), (50, "imagenet"), (18, "cifar")])
def test_output_is_torchvisions(depth, stem):
    ours, theirs = torchvision_twin(depth, stem)
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_narrow_depth_10():
    """(1, 1, 1, 1) basic blocks; width 0.25 leaves 16 channels in the stem and 128 at the end."""
    encoder = ResNet(CIFAR_10)
    assert encoder.conv1.weight.shape == (16, 3, 3, 3)
    assert [len(getattr(encoder, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert encoder.feature_dim == 128
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_channels_last_gives_the_same():
    encoder = ResNet(CIFAR_10).eval()
    seen = []
    encoder.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(x)
        output = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_blocks_start_as_their_shortcut():
    """γ = 0 in the last batch norm of each block, 1 in all others."""
    for depth, last in ((18, "bn2"), (50, "bn3")):
        encoder = ResNet(EncoderConfig(depth=depth, width=0.25))
        for name, module in encoder.named_modules():
            if isinstance(module, GlobalBatchNorm2d):
                gamma = 0.0 if name.startswith("layer") and name.endswith(last) else 1.0
                assert (module.weight == gamma).all(), name
                assert (module.bias == 0).all()


def test_convolutions_start_as_keras_variance_scaling():
    """Standard deviation √(1/fan_in) after the cut at two of the uncut normal's (√(1/fan_in)/0.8796)."""
    weight = torch.empty(256, 64, 3, 3)
    torch.manual_seed(0)
    initialise_convolution(weight)
    std = (64 * 9) ** -0.5
    assert weight.std().item() == pytest.approx(std, rel=0.01)  # 147,456 draws: 0.2 %
    assert weight.abs().max().item() == pytest.approx(2 * std / 0.8796, rel=0.001)
    assert weight.mean().item() == pytest.approx(0, abs=0.01 * std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, r"`encoder.depth` must be one of \(10, 18, 34, 50, 101, 152\), got 20"),
        ({"stem": "mnist"}, "`encoder.stem` must be 'imagenet' or 'cifar', got 'mnist'"),
        ({"width": 0.3}, "`encoder.width` must make 64 × width a whole number .* got 0.3; use a multiple"),
        ({"width": 0}, "`encoder.width` .* got 0"),
        ({"width": -1}, "`encoder.width` .* got -1"),
        ({"width": float("nan")}, "`encoder.width` .* got nan"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**options)
