"""ResNets as other programs name and build them: which encoder of ours their tensors are, and their own network.

Sources: torchvision's ResNet; timm's, of the same names; lightly (examples of version 1.6): torchvision's, or its
children in a Sequential, and `lightly.models.ResNetGenerator`, which has the CIFAR stem and calls shortcuts `shortcut`;
solo-learn (solo/methods/base.py at 9187ea3): torchvision's under `backbone.`, earlier `encoder.`.

Two of their habits leave no trace in names and shapes: solo-learn's CIFAR stem is padded by 2; the children of
lightly's own network in a Sequential, as in its CIFAR-10 benchmark, lack the ReLU after the first batch norm, which is
no layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from model.resnet import BASIC_DEPTHS, NUM_BLOCKS, STEM_WIDTH, EncoderConfig, Stem
from tools.export_counterparts import cifar_stem

Source = Literal["torchvision", "timm", "lightly", "solo_learn"]
STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a source names the tensors of a ResNet.

    Attributes:
        parts: its name of each of our parts.
        shortcut: its name of a block's `downsample`.
        classifier: its name of the last layer, which is no part of the encoder.
        is_sequential: its parts are numbered as a Sequential's.
    """

    parts: Mapping[str, str]
    shortcut: str
    classifier: str
    is_sequential: bool

    def theirs(self, name: str) -> str:
        """Our name → theirs."""
        part, _, rest = name.partition(".")
        return f"{self.parts[part]}.{rest}".replace(".downsample.", f".{self.shortcut}.")


def _layout(shortcut: str, classifier: str, numbers: range | None) -> Layout:
    ours = ("conv1", "bn1", *STAGES)
    theirs = ours if numbers is None else ("0", "1", *map(str, numbers))
    parts = dict(zip(ours, theirs, strict=True))
    return Layout(parts=parts, shortcut=shortcut, classifier=classifier, is_sequential=numbers is not None)


TORCHVISION = _layout("downsample", "fc", None)
TORCHVISION_CHILDREN = _layout("downsample", "fc", range(4, 8))  # 2 and 3 are the ReLU and the max-pool
LIGHTLY = _layout("shortcut", "linear", None)
LIGHTLY_CHILDREN = _layout("shortcut", "linear", range(2, 6))


def find_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """How the tensors of an encoder are named; a source's prefix is taken off."""
    has_shortcuts = any(".shortcut." in name for name in tensors)
    if "conv1.weight" in tensors:
        return LIGHTLY if has_shortcuts else TORCHVISION
    return LIGHTLY_CHILDREN if has_shortcuts else TORCHVISION_CHILDREN


def guess_source(layout: Layout, names: Mapping[str, Tensor], prefix: str) -> Source | None:
    """Who wrote a file, by the names in it; None where an encoder under such a prefix may be of several."""
    if layout is not TORCHVISION or any("projection_head" in name for name in names):
        return "lightly"
    if prefix.endswith(("backbone.", "encoder.")):
        is_solo = any(part in name.split(".") for name in names for part in ("projector", "classifier", "predictor"))
        return "solo_learn" if is_solo else None
    return "torchvision"


def detect_config(tensors: Mapping[str, Tensor], layout: Layout, source: Source | None) -> EncoderConfig:
    """Depth, width and stem, by the number of blocks, the first convolution's shape and the source's habits.

    Raises:
        ValueError: they are of no ResNet that there is here.
    """
    stages = [layout.parts[stage] for stage in STAGES]
    blocks = tuple(len({name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")}) for stage in stages)
    is_bottleneck = f"{stages[0]}.0.conv3.weight" in tensors
    depths = [d for d, counts in NUM_BLOCKS.items() if counts == blocks and is_bottleneck == (d not in BASIC_DEPTHS)]
    if not depths:
        kind = "bottlenecks" if is_bottleneck else "basic blocks"
        raise ValueError(f"stages of {blocks} {kind} are of no ResNet of depth {', '.join(map(str, NUM_BLOCKS))}")
    first = f"{layout.parts['conv1']}.weight"
    channels, _, *kernel = tensors[first].shape
    if kernel not in ([7, 7], [3, 3]):
        raise ValueError(f"`{first}` must be 7×7 (ImageNet stem) or 3×3 (CIFAR stem), got {list(tensors[first].shape)}")
    stem: Stem = "imagenet"
    if kernel == [3, 3]:
        stem = "cifar_linear" if layout is LIGHTLY_CHILDREN else "cifar_padded" if source == "solo_learn" else "cifar"
    depth = cast("Literal[10, 18, 34, 50, 101, 152]", depths[0])
    return EncoderConfig(depth=depth, width=channels / STEM_WIDTH, stem=stem)


def build_reference(source: Source, layout: Layout, config: EncoderConfig, num_classes: int) -> nn.Module | None:
    """The source's own network, which takes its tensors under its own names.

    Returns:
        The network, in evaluation mode, with random weights: images → logits, or representations where `num_classes` is
        0. None where no installed package builds it.
    """
    if layout in (LIGHTLY, LIGHTLY_CHILDREN):
        return _lightly(layout, config, num_classes)
    if config.width != 1:
        return None
    if source == "timm" and config.depth != 10 and importlib.util.find_spec("timm") is not None:
        import timm

        model: nn.Module = timm.create_model(f"resnet{config.depth}", num_classes=num_classes)
    else:
        block = BasicBlock if config.depth in BASIC_DEPTHS else Bottleneck
        model = TorchvisionResNet(block, list(NUM_BLOCKS[config.depth]), num_classes=num_classes or 1)
        if num_classes == 0:
            model.fc = nn.Identity()
    for name, layer in cifar_stem(config, "relu").items():
        setattr(model, name, layer)
    if layout.is_sequential:
        model = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    return model.eval()


def _lightly(layout: Layout, config: EncoderConfig, num_classes: int) -> nn.Module | None:
    if config.stem == "imagenet" or importlib.util.find_spec("lightly") is None:
        return None
    from lightly.models import ResNetGenerator

    name = f"resnet-{9 if config.depth == 10 else config.depth}"
    model: nn.Module = ResNetGenerator(name, width=config.width, num_classes=num_classes or 1)
    if layout.is_sequential:
        return nn.Sequential(*list(model.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    if num_classes == 0:
        model.linear = nn.Identity()
    return model.eval()
