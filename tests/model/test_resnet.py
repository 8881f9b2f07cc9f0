"""The encoders against torchvision's and against the published parameter counts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model.norm import GlobalBatchNorm2d
from model.resnet import (
    AveragePool,
    EncoderConfig,
    ResNet,
    SelectiveKernel,
    SelectiveKernelBottleneck,
    initialise_convolution,
)

CIFAR_10 = EncoderConfig(depth=10, width=0.25, stem="cifar")
SK_50 = EncoderConfig(depth=50, width=1 / 16, selective_kernel=True)


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
    ("depth", "width", "selective_kernel", "millions"),
    [
        (50, 1, False, 24),
        (50, 1, True, 35),
        (50, 2, False, 94),
        (50, 2, True, 140),
        (101, 1, False, 43),
        (101, 1, True, 65),
        (101, 2, False, 170),
        (101, 2, True, 257),
        (152, 1, False, 58),
        (152, 1, True, 89),
        (152, 2, False, 233),
        (152, 2, True, 354),
        (152, 3, True, 795),
    ],
)
def test_published_parameter_counts(depth, width, selective_kernel, millions):
    """SimCLR v2, table 1, in millions.

    What fits every row is the encoder's variables as TensorFlow counts them: convolutions, γ and β, and the
    running means and variances (without these 152, 2 would be 232); no classifier (with its 1000-way `fc`
    ResNet-50 has 25.6) and no projection head.
    """
    with torch.device("meta"):
        encoder = ResNet(EncoderConfig(depth=depth, width=width, selective_kernel=selective_kernel))
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


@pytest.mark.parametrize("config", [CIFAR_10, SK_50], ids=["plain", "selective kernel"])
def test_channels_last_gives_the_same(config):
    encoder = ResNet(config).eval()
    seen = []
    encoder.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(x)
        output = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def random_norms_(module):
    """Move every batch norm away from where it starts, the last ones of the blocks from 0."""
    generator = torch.Generator().manual_seed(2)
    for norm in module.modules():
        if isinstance(norm, GlobalBatchNorm2d):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                torch.nn.init.uniform_(value, 0.5, 1.5, generator=generator)
    return module


def normalised(norm, x):
    """By the running statistics, from the definition."""
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return weight * (x - mean) / (var + 1e-5).sqrt() + bias


def plain_selective_kernel(kernel, x, stride):
    """Li et al. 2019, equations 1 to 6, branch by branch."""
    channels = x.shape[1]
    u = F.conv2d(x, kernel.conv.weight, stride=stride, padding=1)
    u = normalised(kernel.bn, u).relu()
    first, second = u[:, :channels], u[:, channels:]
    context = (first + second).mean((2, 3))
    squeezed = context @ kernel.squeeze.weight.flatten(1).T
    squeezed = normalised(kernel.squeeze_bn, squeezed[..., None, None]).relu().flatten(1)
    logits = squeezed @ kernel.select.weight.flatten(1).T
    attention = torch.stack((logits[:, :channels], logits[:, channels:])).softmax(0)[..., None, None]
    return attention[0] * first + attention[1] * second


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize(("channels", "stride"), [(6, 1), (6, 2), (640, 2)])
def test_selective_kernel_is_the_formula(channels, stride, size):
    torch.manual_seed(1)
    kernel = random_norms_(SelectiveKernel(channels, stride)).double().eval()
    assert kernel.squeeze.out_channels == {6: 32, 640: 40}[channels]  # a sixteenth, at least 32
    x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    output, expected = kernel(x), plain_selective_kernel(kernel, x, stride)
    assert output.shape == (2, channels, *(-(-side // stride) for side in size))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *kernel.parameters())
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_shortcuts_average_as_googles(size, stride):
    """At stride 1 TensorFlow's "SAME", whose padding does not count; at stride 2 a padding of zeros, which does."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pooled = AveragePool(stride)(x)
    height, width = size
    assert pooled.shape == (2, 3, -(-height // stride), -(-width // stride))
    for i, j in np.ndindex(*pooled.shape[2:]):
        window = x[:, :, i * stride : i * stride + 2, j * stride : j * stride + 2]
        count = window[0, 0].numel() if stride == 1 else 4
        torch.testing.assert_close(pooled[:, :, i, j], window.sum((2, 3)) / count)


def test_selective_kernel_block_is_its_parts():
    """relu(bn(1×1 of the kernel of relu(bn(1×1))) + bn(1×1 of the mean over 2×2))."""
    block = random_norms_(SelectiveKernelBottleneck(6, 4, stride=2)).double().eval()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    y = normalised(block.bn1, F.conv2d(x, block.conv1.weight)).relu()
    y = normalised(block.bn3, F.conv2d(plain_selective_kernel(block.conv2, y, 2), block.conv3.weight))
    _, convolution, norm = block.downsample
    shortcut = normalised(norm, F.conv2d(AveragePool(2)(x), convolution.weight))
    torch.testing.assert_close(block(x), (y + shortcut).relu(), rtol=1e-12, atol=1e-12)


def test_selective_kernel_net():
    """The stem of three convolutions, the names, and a gradient for every parameter, at odd and even sides."""
    encoder = random_norms_(ResNet(SK_50))
    stem = [tuple(m.weight.shape) for m in encoder.conv1 if isinstance(m, nn.Conv2d)]
    assert stem == [(2, 3, 3, 3), (2, 2, 3, 3), (4, 2, 3, 3)]
    assert [m.stride for m in encoder.conv1 if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1), (1, 1)]
    names = {name for name, _ in encoder.named_parameters() if name.startswith("layer2.0")}
    norms = ("bn1", "conv2.bn", "conv2.squeeze_bn", "bn3", "downsample.2")
    convolutions = ("conv1", "conv2.conv", "conv2.squeeze", "conv2.select", "conv3", "downsample.1")
    assert names == {f"layer2.0.{name}.weight" for name in norms + convolutions} | {
        f"layer2.0.{name}.bias" for name in norms
    }
    for height, width in ((64, 64), (65, 50), (33, 47)):
        encoder.zero_grad()
        h = encoder(torch.randn(3, 3, height, width).contiguous(memory_format=torch.channels_last))
        assert h.shape == (3, encoder.feature_dim) == (3, 128)
        h.square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_selective_kernel_keeps_the_cifar_stem():
    encoder = ResNet(EncoderConfig(depth=50, width=1 / 64, stem="cifar", selective_kernel=True))
    assert encoder.conv1.weight.shape == (1, 3, 3, 3)
    assert encoder(torch.randn(2, 3, 9, 8)).shape == (2, 32)


def test_blocks_start_as_their_shortcut():
    """γ = 0 in the last batch norm of each block, 1 in all others."""
    for depth, last, selective_kernel in ((18, "bn2", False), (50, "bn3", False), (50, "bn3", True)):
        encoder = ResNet(EncoderConfig(depth=depth, width=0.25, selective_kernel=selective_kernel))
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
        ({"depth": 20}, r"`model.encoder.depth` must be one of \(10, 18, 34, 50, 101, 152\), got 20"),
        ({"stem": "mnist"}, "`model.encoder.stem` must be one of imagenet, .*, cifar_linear, got 'mnist'"),
        ({"width": 0.3}, "`model.encoder.width` must make 64 × width a whole number .* got 0.3; use a multiple"),
        ({"width": 0}, "`model.encoder.width` .* got 0"),
        ({"width": -1}, "`model.encoder.width` .* got -1"),
        ({"width": float("nan")}, "`model.encoder.width` .* got nan"),
        (
            {"depth": 18, "selective_kernel": True},
            "`model.encoder.selective_kernel` needs .* `model.encoder.depth` 18; use 50, 101",
        ),
        ({"width": 1 / 64, "selective_kernel": True}, "must be even, got 1 .* multiple of 1/32"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**options)
