"""From a configuration and a seed to a method ready to train."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from model.heads import ProjectionHeadConfig
from model.methods.base import Method
from model.methods.simclr import SimCLR
from model.resnet import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The method, its networks and its loss."""

    method: Literal["simclr"] = "simclr"
    """The self-supervised method."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder."""
    projection_head: ProjectionHeadConfig = field(default_factory=ProjectionHeadConfig)
    """The projection head, used in pretraining only."""
    temperature: float = 0.1
    """τ of the loss: 0.1 on ImageNet, 0.5 on CIFAR-10 and for long runs."""

    def __post_init__(self) -> None:
        if self.method != "simclr":
            raise ValueError(f"`model.method` must be 'simclr', got {self.method!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"`model.temperature` must be a finite number > 0, got {self.temperature}; try 0.1")


def num_views(config: ModelConfig) -> int:
    """Views of each image that the method takes."""
    assert config.method == "simclr"
    return SimCLR.num_views


def build_method(config: ModelConfig, seed: int) -> Method:
    """The method, with weights that depend on `config` and `seed` alone; global generators stay as they are.

    Weights are drawn on the CPU, hence the same for every device they later move to. Under
    `torch.device("meta")` the method is built without storage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the GPUs' generators
        return SimCLR(config.encoder, config.projection_head, config.temperature)
