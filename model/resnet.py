"""ResNet encoders of SimCLR: depths 10 to 152, any width, ImageNet or CIFAR stem; x [N, 3, H, W] → h [N, D].

Source: He et al. 2015, in the form of google-research/simclr `tf2/resnet.py`: stride on the 3×3 convolution,
γ = 0 in each block's last batch norm, the width multiplier widens the stem too, and with the CIFAR stem (3×3,
stride 1) there is no max-pool. Depth 10 is one basic block a stage, for small images and tests.

Parameters carry torchvision's names (`conv1`, `bn1`, `layer1.0.conv1` …, no `fc`), and the same weights give
the same output as there. Where google's graph differs we follow torchvision, whose checkpoints people hold:
depths 10, 18 and 34 have no projection shortcut in `layer1`, and the max-pool pads both sides. Batch norm is
over the global batch. Initialisation is google's: see `initialise_convolution`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import GlobalBatchNorm2d

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


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder: which ResNet."""

    depth: Literal[10, 18, 34, 50, 101, 152] = 50
    """Number of layers; 10, 18 and 34 have basic blocks, the others bottlenecks."""
    width: float = 1.0
    """Multiplier of every layer's channels, the stem's 64 included (0.25: 16 channels)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7×7 of stride 2, then a max-pool; cifar (for 32² images): 3×3 of stride 1, no max-pool."""

    def __post_init__(self) -> None:
        if self.depth not in NUM_BLOCKS:
            raise ValueError(f"`encoder.depth` must be one of {tuple(NUM_BLOCKS)}, got {self.depth}")
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"`encoder.stem` must be 'imagenet' or 'cifar', got {self.stem!r}")
        channels = STEM_WIDTH * self.width
        if not (math.isfinite(channels) and channels >= 1 and channels == int(channels)):
            raise ValueError(
                f"`encoder.width` must make {STEM_WIDTH} × width a whole number of channels ≥ 1, "
                f"got {self.width}; use a multiple of 1/{STEM_WIDTH} such as 0.25, 1 or 2"
            )


class ResNet(nn.Module):
    """Encoder f(·): images [N, 3, H, W] → h [N, feature_dim]; the fast memory format is channels_last."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = int(STEM_WIDTH * config.width)
        block = BasicBlock if config.depth in BASIC_DEPTHS else Bottleneck
        is_imagenet = config.stem == "imagenet"
        self.conv1 = _convolution(3, width, kernel_size=7 if is_imagenet else 3, stride=2 if is_imagenet else 1)
        self.bn1 = GlobalBatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if is_imagenet else nn.Identity()
        depths = NUM_BLOCKS[config.depth]
        self.layer1 = _stage(block, width, width, depths[0], stride=1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, depths[3], stride=2)
        self.feature_dim = 8 * width * block.expansion

    def forward(self, x: Tensor) -> Tensor:
        """The representation h [N, feature_dim]: the last stage averaged over its positions."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
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


def initialise_convolution(weight: Tensor) -> None:
    """Truncated normal of variance 1/fan_in: Keras's `VarianceScaling()`, as in google's `tf2/resnet.py`.

    Followed rather than torchvision's He initialisation (variance 2/fan_out), because the published learning
    rates go with it: batch norm hides a convolution's scale from the output, not from the optimizer.
    """
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # Keras's constant: the std of a unit normal cut at ±2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _convolution(in_channels: int, channels: int, *, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    initialise_convolution(convolution.weight)
    return convolution


def _downsample(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(_convolution(in_channels, channels, kernel_size=1, stride=stride), GlobalBatchNorm2d(channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, num_blocks: int, stride: int
) -> nn.Sequential:
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(channels * block.expansion, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
