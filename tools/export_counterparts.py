"""Our encoders as torchvision and timm have them: which of their networks takes the weights, and with which changes.

Plain ResNets of width 1 bear the same names in all three, and mean the same by them. What is not in their catalogue
either follows from a published network by a change that a line can tell, or has no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from model.resnet import BASIC_DEPTHS, NUM_BLOCKS, EncoderConfig
from train.cli import UnfitEnvironment

Keys = Literal["torchvision", "timm"]
PUBLISHED_DEPTHS = (18, 34, 50, 101, 152)
STEM_RELU: dict[Keys, str] = {"torchvision": "relu", "timm": "act1"}  # of nothing but the stem


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """A network of another library that computes what an encoder does.

    Attributes:
        lines: Python that makes it, without its classifier, in evaluation mode once the weights are loaded.
        changes: what of it differs from the library's own ResNet of that depth.
        build: does what the lines say; random weights.
    """

    lines: tuple[str, ...]
    changes: tuple[str, ...]
    build: Callable[[], nn.Module]


def find_counterpart(config: EncoderConfig, keys: Keys) -> Counterpart:
    """What takes the weights of an encoder.

    Raises:
        ValueError: nothing there does; says why.
        UnfitEnvironment: the library is not installed.
    """
    if config.selective_kernel:
        raise ValueError(
            f"{keys} has no network that computes what `model.encoder.selective_kernel` does; "
            "export it with `--format onnx` or `torch_export`"
        )
    if config.width != 1:
        raise ValueError(
            f"{keys} has no ResNet that is wider in every layer, got `model.encoder.width` {config.width:g}; "
            "export it with `--format onnx` or `torch_export`"
        )
    stem = _stem_changes(config, keys)
    lines, network = _torchvision(config.depth) if keys == "torchvision" else _timm(config.depth)
    own_network = () if config.depth in PUBLISHED_DEPTHS else (lines[1],)

    def build() -> nn.Module:
        model = network()
        for name, layer in cifar_stem(config, STEM_RELU[keys]).items():
            setattr(model, name, layer)
        return model

    return Counterpart(
        lines=(*lines, *stem),
        changes=(*own_network, *stem),
        build=build,
    )


def cifar_stem(config: EncoderConfig, relu: str) -> dict[str, nn.Module]:
    """What takes the place of layers of torchvision's or timm's ImageNet stem; nothing if that is the encoder's own.

    Args:
        config: of the encoder.
        relu: the name of the stem's ReLU there.
    """
    if config.stem == "imagenet":
        return {}
    conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=_padding(config), bias=False)
    linear: dict[str, nn.Module] = {relu: nn.Identity()} if config.stem == "cifar_linear" else {}
    return {"conv1": conv1, "maxpool": nn.Identity()} | linear


def _stem_changes(config: EncoderConfig, keys: Keys) -> tuple[str, ...]:
    """The same as Python lines."""
    conv1 = f"torch.nn.Conv2d(3, 64, kernel_size=3, padding={_padding(config)}, bias=False)"
    return tuple(
        f"model.{name} = {conv1 if name == 'conv1' else 'torch.nn.Identity()'}"
        for name in cifar_stem(config, STEM_RELU[keys])
    )


def _padding(config: EncoderConfig) -> int:
    return 2 if config.stem == "cifar_padded" else 1


def _torchvision(depth: int) -> tuple[tuple[str, ...], Callable[[], nn.Module]]:
    blocks = list(NUM_BLOCKS[depth])
    block = BasicBlock if depth in BASIC_DEPTHS else Bottleneck
    name = f"torchvision.models.resnet{depth}()"
    if depth not in PUBLISHED_DEPTHS:
        name = f"torchvision.models.resnet.ResNet(torchvision.models.resnet.{block.__name__}, {blocks})"

    def network() -> nn.Module:
        model: nn.Module = ResNet(block, blocks)
        model.fc = nn.Identity()
        return model

    return ("import torch, torchvision", f"model = {name}", "model.fc = torch.nn.Identity()"), network


def _timm(depth: int) -> tuple[tuple[str, ...], Callable[[], nn.Module]]:
    try:
        import timm
    except ImportError as error:
        raise UnfitEnvironment("`--keys timm` needs timm to check the file; pip install timm") from error
    if depth in PUBLISHED_DEPTHS:
        line = f'model = timm.create_model("resnet{depth}", num_classes=0)'
        return ("import torch, timm", line), lambda: timm.create_model(f"resnet{depth}", num_classes=0)
    own = timm.models.resnet
    block = "BasicBlock" if depth in BASIC_DEPTHS else "Bottleneck"
    line = f"model = timm.models.resnet.ResNet(timm.models.resnet.{block}, {NUM_BLOCKS[depth]}, num_classes=0)"
    network = partial(own.ResNet, getattr(own, block), NUM_BLOCKS[depth], num_classes=0)
    return ("import torch, timm", line), network
