"""The network whose outputs are evaluated: an encoder with none, some or all layers of its projection head.

Learned, or randomly initialised, or none at all: then the pixels are the representation.

Legend: N images, H×W pixels of a view, D width of a representation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.build import build_method
from model.heads import ProjectionHead
from model.resnet import EncoderConfig, ResNet
from train.checkpoint import Checkpoint
from train.config import PretrainConfig, config_from_dict
from train.evaluation.protocol import Representation
from train.initial_encoder import Weights, check_fits, encoder_weights

HEAD = "projection_head."


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """What is evaluated, in evaluation mode, on the CPU.

    Attributes:
        encoder: views [N, 3, H, W] → h.
        head: the layers of the projection head that there are.
        num_head_layers: that the whole head has; more than `head` where a classifier kept the first ones alone.
        source: the checkpoint's file, for messages.
    """

    encoder: nn.Module
    head: list[nn.Module]
    num_head_layers: int
    source: Path

    def resolve(self, head_layers: int) -> int:
        """A number of layers that are to be kept, with −1 for all, as a number from 0.

        Raises:
            ValueError: there are not as many.
        """
        if head_layers and not self.head:
            raise ValueError(
                f"`head_layers` must be 0 for {self.source}, which holds an encoder alone, got {head_layers}"
            )
        most = len(self.head)
        if head_layers > most or (head_layers < 0 and most < self.num_head_layers):
            raise ValueError(
                f"`head_layers` must be from 0 to {most}, the layers of the projection head that {self.source} holds"
                f"{f' (of {self.num_head_layers})' if most < self.num_head_layers else ''}, got {head_layers}"
            )
        return most if head_layers < 0 else head_layers

    def with_layers(self, layers: Sequence[int]) -> LayeredNetwork:
        """What maps views to the representations after so many layers of the head each; see `resolve`."""
        return LayeredNetwork(self.encoder, self.head, [self.resolve(layer) for layer in layers])


class LayeredNetwork(nn.Module):
    """Views [N, 3, H, W] → one representation [N, D] for each entry of `layers`, in one pass."""

    def __init__(self, encoder: nn.Module, head: Sequence[nn.Module], layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.ModuleList(head[: max(layers)])
        self.layers = tuple(layers)
        self.eval()

    def forward(self, views: Tensor) -> list[Tensor]:
        """See the class."""
        outputs = [self.encoder(views)]
        for layer in self.head:
            outputs.append(layer(outputs[-1]))
        return [outputs[layer] for layer in self.layers]


def build_network(
    representation: Representation, checkpoint: Checkpoint, *, weights: Weights = "live", source: Path
) -> Network:
    """The network of a checkpoint.

    `random` is the network that the checkpoint's run started from, but for the residual branches, which SimCLR closes
    at the start (γ = 0) and which are open here: a far stronger baseline, and so the fairer one.

    Args:
        representation: which network; `pixels`: none.
        checkpoint: of a run, or imported: an encoder alone.
        weights: of `learned`: those of the last step, or their moving average.
        source: the checkpoint's file, for messages.

    Raises:
        ValueError: the checkpoint's configuration is of another version, or its weights are not those of its network.
    """
    if representation == "pixels":
        return Network(encoder=nn.Flatten(), head=[], num_head_layers=0, source=source)
    config = config_from_dict(checkpoint.config)
    num_head_layers = config.model.projection_head.num_layers
    if representation == "random":
        method = build_method(config.model, config.seed)
        open_residual_branches(method.encoder)
        found = getattr(method, "projection_head", None)
        head = list(found.layers) if isinstance(found, ProjectionHead) else []
        return Network(encoder=method.encoder.eval(), head=head, num_head_layers=num_head_layers, source=source)
    return Network(
        encoder=load_encoder(config.model.encoder, encoder_weights(checkpoint, weights, source), source),
        head=_load_head(config, checkpoint.model if weights == "live" else checkpoint.average, source),
        num_head_layers=num_head_layers,
        source=source,
    )


def build_encoder(
    representation: Representation,
    checkpoint: Checkpoint,
    *,
    weights: Weights = "live",
    source: Path = Path("the checkpoint"),
) -> nn.Module:
    """What maps views [N, 3, H, W] to representations h [N, D]; see `build_network`."""
    return build_network(representation, checkpoint, weights=weights, source=source).encoder


def load_encoder(config: EncoderConfig, weights: dict[str, Tensor], source: Path) -> ResNet:
    """The encoder with these weights, which it shares, in evaluation mode.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        encoder = ResNet(config)
    check_fits(weights, encoder.state_dict(), source, "its configuration is of another encoder")
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval()


def open_residual_branches(encoder: nn.Module) -> None:
    """Set every norm's scale to 1."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)


def _load_head(config: PretrainConfig, state: dict[str, Tensor], source: Path) -> list[nn.Module]:
    """The layers of the projection head that a checkpoint holds: all, the first ones, or none."""
    found = {name.removeprefix(HEAD): tensor for name, tensor in state.items() if name.startswith(HEAD)}
    kept = 1 + max((int(match[1]) for name in found if (match := re.match(r"layers\.(\d+)\.", name))), default=-1)
    if kept == 0:
        return []
    with torch.device("meta"):
        width = ResNet(config.model.encoder).feature_dim
        head = ProjectionHead(width, config.model.projection_head)
        del head.layers[kept:]
    check_fits(found, head.state_dict(), source, "its configuration is of another projection head")
    head.load_state_dict(found, assign=True)
    return list(head.eval().layers)
