"""ResNet encoders of SimCLR: depths 10 to 152, any width, ImageNet or CIFAR stem; x [N, 3, H, W] → h [N, D].

Source: He et al. 2015, in the form of google-research/simclr `tf2/resnet.py`: stride on the 3×3 convolution,
γ = 0 in each block's last batch norm, the width multiplier widens the stem too, and with the CIFAR stem (3×3,
stride 1) there is no max-pool. Depth 10 is one basic block a stage, for small images and tests.

Parameters carry torchvision's names (`conv1`, `bn1`, `layer1.0.conv1` …, no `fc`), and the same weights give
the same output as there. Where google's graph differs we follow torchvision, whose checkpoints people hold:
depths 10, 18 and 34 have no projection shortcut in `layer1`, and the max-pool pads both sides. Batch norm is
over the global batch. Initialisation is google's: see `initialise_convolution`.

With `selective_kernel` (SimCLR v2; Li et al. 2019, `SK_Conv2D` in the same file with `sk_ratio` 0.0625) each
bottleneck's 3×3 convolution becomes two that mix by what the image holds, and the net becomes a ResNet-D (He et
al. 2018): a stem of three 3×3 convolutions, and shortcuts that average where they would skip. Names are those of
above and, in the stem and the shortcuts, timm's for ResNet-D:

    conv1.{0,3,6}, conv1.{1,4}, bn1                  the stem's convolutions, and the batch norms after each
    layerI.J.downsample.{1,2}                        convolution and batch norm of a shortcut (0 is the pooling)
    layerI.J.conv2.{conv,bn}                         both branches' 3×3, first the one, then the other
    layerI.J.conv2.{squeeze,squeeze_bn,select}       what weighs them against each other (there is no bn2)

The CIFAR stem stays what it is, as in google's. Unlike elsewhere, pooling pads as google's (right and bottom).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import GlobalBatchNorm2d

Stem = Literal["imagenet", "cifar", "cifar_padded", "cifar_linear"]
STEM_WIDTH = 64
NUM_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_DEPTHS = (10, 18, 34)
SQUEEZE_RATIO = 16  # the published `sk_ratio` of 0.0625
SQUEEZE_MIN_CHANNELS = 32


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder: which ResNet."""

    depth: Literal[10, 18, 34, 50, 101, 152] = 50
    """Number of layers; 10, 18 and 34 have basic blocks, the others bottlenecks."""
    width: float = 1.0
    """Multiplier of every layer's channels, the stem's 64 included (0.25: 16 channels)."""
    stem: Stem = "imagenet"
    """imagenet: 7×7 of stride 2, then a max-pool; cifar (for 32² images): 3×3 of stride 1, no max-pool. For imported
    encoders: `cifar_padded`, padded by 2, as solo-learn's; `cifar_linear`, without a ReLU, as lightly's benchmark's."""
    selective_kernel: bool = False
    """SimCLR v2's larger networks (SK-ResNet on ResNet-D); depths 50, 101 and 152 only."""

    def __post_init__(self) -> None:
        if self.depth not in NUM_BLOCKS:
            raise ValueError(f"`model.encoder.depth` must be one of {tuple(NUM_BLOCKS)}, got {self.depth}")
        if self.stem not in get_args(Stem):
            raise ValueError(f"`model.encoder.stem` must be one of {', '.join(get_args(Stem))}, got {self.stem!r}")
        channels = STEM_WIDTH * self.width
        if not (math.isfinite(channels) and channels >= 1 and channels == int(channels)):
            raise ValueError(
                f"`model.encoder.width` must make {STEM_WIDTH} × width a whole number of channels ≥ 1, "
                f"got {self.width}; use a multiple of 1/{STEM_WIDTH} such as 0.25, 1 or 2"
            )
        if self.selective_kernel and self.depth in BASIC_DEPTHS:
            raise ValueError(
                f"`model.encoder.selective_kernel` needs bottleneck blocks, got `model.encoder.depth` {self.depth}; "
                "use 50, 101 or 152"
            )
        if self.selective_kernel and self.stem == "imagenet" and channels % 2:
            raise ValueError(
                f"`model.encoder.selective_kernel` halves the stem's channels, which must be even, got "
                f"{channels:.0f} of `model.encoder.width` {self.width}; use a multiple of 1/{STEM_WIDTH // 2}"
            )


class ResNet(nn.Module):
    """Encoder f(·): images [N, 3, H, W] → h [N, feature_dim]; the fast memory format is channels_last."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = int(STEM_WIDTH * config.width)
        block = _block(config)
        self.conv1 = _stem(config, width)
        self.bn1 = GlobalBatchNorm2d(width)
        is_imagenet = config.stem == "imagenet"
        self.has_stem_relu = config.stem != "cifar_linear"
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if is_imagenet else nn.Identity()
        depths = NUM_BLOCKS[config.depth]
        self.layer1 = _stage(block, width, width, depths[0], stride=1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, depths[3], stride=2)
        self.feature_dim = 8 * width * block.expansion

    def forward(self, x: Tensor) -> Tensor:
        """The representation h [N, feature_dim]: the last stage averaged over its positions."""
        x = self.bn1(self.conv1(x))
        x = self.maxpool(F.relu(x, inplace=True) if self.has_stem_relu else x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class BasicBlock(nn.Module):
    """relu(shortcut + two 3×3 convolutions), the first with the stride."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, kernel_size=3, stride=stride)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, kernel_size=3)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] → [N, channels, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """relu(shortcut + 1×1, 3×3 with the stride, 1×1 convolutions); four times as wide outside as inside."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _convolution(in_channels, channels, kernel_size=1)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, kernel_size=3, stride=stride)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv3 = _convolution(channels, out_channels, kernel_size=1)
        self.bn3 = GlobalBatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] → [N, 4·channels, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class SelectiveKernelBottleneck(nn.Module):
    """`Bottleneck` with a `SelectiveKernel` for its 3×3 convolution, and an averaging shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _convolution(in_channels, channels, kernel_size=1)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.conv2 = SelectiveKernel(channels, stride)
        self.conv3 = _convolution(channels, out_channels, kernel_size=1)
        self.bn3 = GlobalBatchNorm2d(out_channels)
        self.downsample = _averaging_downsample(in_channels, out_channels, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] → [N, 4·channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(self.conv2(y)))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class SelectiveKernel(nn.Module):
    """Two 3×3 convolutions with batch norm and ReLU, mixed channel by channel by what the whole image holds.

        u₁, u₂ = relu(bn(conv(x)))                        C channels each, out of one convolution to 2C
        s = relu(bn(squeeze(mean of u₁ + u₂ over positions)))         max(C/16, 32) channels
        a₁, a₂ = softmax(select(s)) over the two branches             C channels each
        y = a₁·u₁ + a₂·u₂

    (Li et al. 2019, equations 1–6, as google has it: both kernels are 3×3 and undilated.)
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        squeezed = max(channels // SQUEEZE_RATIO, SQUEEZE_MIN_CHANNELS)
        self.conv = _convolution(channels, 2 * channels, kernel_size=3, stride=stride)
        self.bn = GlobalBatchNorm2d(2 * channels)
        self.squeeze = _convolution(channels, squeezed, kernel_size=1)
        self.squeeze_bn = GlobalBatchNorm2d(squeezed)
        self.select = _convolution(squeezed, 2 * channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        branches = F.relu(self.bn(self.conv(x)), inplace=True)
        first, second = branches.chunk(2, dim=1)
        context = sum(F.adaptive_avg_pool2d(branches, 1).chunk(2, dim=1))
        squeezed = F.relu(self.squeeze_bn(self.squeeze(context)), inplace=True)
        # Of two values the softmax is the logistic function of their difference.
        logit, other = self.select(squeezed).chunk(2, dim=1)
        return torch.lerp(second, first, torch.sigmoid(logit - other))


class AveragePool(nn.Module):
    """Means over 2×2 positions, as google's shortcuts take them.

    Both pad right and bottom: stride 2 by zeros, which only odd sides meet; stride 1 by positions that do not
    count, so that the last row and column are means of what is there.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        if self.stride == 1:
            x = F.pad(x, (0, 1, 0, 1), mode="replicate")  # a mean of a value with itself is the value
        elif x.shape[2] % 2 or x.shape[3] % 2:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return F.avg_pool2d(x, 2, self.stride)


Block = type[BasicBlock] | type[Bottleneck] | type[SelectiveKernelBottleneck]


def initialise_convolution(weight: Tensor) -> None:
    """Truncated normal of variance 1/fan_in: Keras's `VarianceScaling()`, as in google's `tf2/resnet.py`.

    Followed rather than torchvision's He initialisation (variance 2/fan_out), because the published learning
    rates go with it: batch norm hides a convolution's scale from the output, not from the optimizer.
    """
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # Keras's constant: the std of a unit normal cut at ±2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _convolution(
    in_channels: int, channels: int, *, kernel_size: int, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    padding = kernel_size // 2 if padding is None else padding
    convolution = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=padding, bias=False)
    initialise_convolution(convolution.weight)
    return convolution


def _stem(config: EncoderConfig, width: int) -> nn.Module:
    """What makes `width` channels of an image; the batch norm after it is not part of it."""
    if config.stem != "imagenet":
        return _convolution(3, width, kernel_size=3, padding=2 if config.stem == "cifar_padded" else 1)
    if not config.selective_kernel:
        return _convolution(3, width, kernel_size=7, stride=2)
    half = width // 2
    return nn.Sequential(
        _convolution(3, half, kernel_size=3, stride=2),
        GlobalBatchNorm2d(half),
        nn.ReLU(inplace=True),
        _convolution(half, half, kernel_size=3),
        GlobalBatchNorm2d(half),
        nn.ReLU(inplace=True),
        _convolution(half, width, kernel_size=3),
    )


def _downsample(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(_convolution(in_channels, channels, kernel_size=1, stride=stride), GlobalBatchNorm2d(channels))


def _averaging_downsample(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    convolution = _convolution(in_channels, channels, kernel_size=1)
    return nn.Sequential(AveragePool(stride), convolution, GlobalBatchNorm2d(channels))


def _block(config: EncoderConfig) -> Block:
    if config.selective_kernel:
        return SelectiveKernelBottleneck
    return BasicBlock if config.depth in BASIC_DEPTHS else Bottleneck


def _stage(block: Block, in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(channels * block.expansion, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
