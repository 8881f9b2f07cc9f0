"""From a configuration and a seed to a method ready to train."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from model.exchange import Exchange
from model.heads import ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss, LossName, check_options
from model.memory import MemoryConfig
from model.methods.base import Method
from model.methods.distill import Distill, DistillConfig
from model.methods.simclr import SimCLR
from model.methods.simclr_memory import SimCLRWithMemory, check_memory
from model.methods.supervised import ClassifierConfig, Supervised, check_head_layers
from model.resnet import EncoderConfig

METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "supervised": Supervised, "distill": Distill}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The method, its networks and its loss."""

    method: Literal["simclr", "supervised", "distill"] = "simclr"
    """`simclr` learns without labels; `supervised` from them: the baseline, and what fine-tuning is; `distill` from
    what `train.teacher` says of the images, and from the labels that there are."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder."""
    projection_head: ProjectionHeadConfig = field(default_factory=ProjectionHeadConfig)
    """The projection head, of which evaluation and fine-tuning keep none or the first layers."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier of `supervised` and `distill`."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """SimCLR v2's memory of keys."""
    loss: LossName = "nt_xent"
    """`nt_xent`, SimCLR's; `nt_logistic` and `margin_triplet` are what its paper compares it with."""
    temperature: float = 0.1
    """τ of NT-Xent and NT-Logistic: 0.1 on ImageNet, 0.5 on CIFAR-10 and for long runs."""
    learn_temperature: bool = False
    """Learn τ, from `temperature` on."""
    normalize: bool = True
    """Compare directions: divide each projection by its norm."""
    semi_hard: bool = False
    """`nt_logistic` and `margin_triplet`: of each row's negatives, only the closest that is farther than the positive
    (and within the margin)."""
    margin: float | None = None
    """`margin_triplet`'s; null: its default."""
    exchange: Exchange = "all_gather"
    """How ranks see each other's projections: `all_gather` holds all of them; `ring` two ranks' at a time, for batches
    whose projections do not fit."""
    norm_group_size: int = 0
    """Ranks, one after another, that share batch norm's statistics; 0: all of them, as SimCLR."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`model.method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_memory(self.memory, loss=self.loss, exchange=self.exchange)
        if self.method != "simclr":
            if self.memory.size:
                raise ValueError(f"`model.memory.size` needs `model.method` simclr, got {self.method}; set it to 0")
            check_head_layers(self.classifier.head_layers, self.projection_head)
        check_options(
            loss=self.loss,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            semi_hard=self.semi_hard,
            margin=self.margin,
            exchange=self.exchange,
        )
        if self.norm_group_size < 0:
            raise ValueError(f"`model.norm_group_size` must be at least 0 (all ranks), got {self.norm_group_size}")


def num_views(config: ModelConfig) -> int:
    """Views of each image that the method takes."""
    return METHODS[config.method].num_views


def needs_labels(config: ModelConfig) -> bool:
    """Whether the method learns from labels, which every image must then have."""
    return METHODS[config.method].needs_labels


def build_method(config: ModelConfig, seed: int) -> Method:
    """The method, with weights that depend on `config` and `seed` alone; global generators stay as they are.

    Weights are drawn on the CPU, hence the same for every device they later move to. Under
    `torch.device("meta")` the method is built without storage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the GPUs' generators
        if config.method == "supervised":
            return Supervised(config.encoder, config.projection_head, config.classifier)
        if config.method == "distill":
            return Distill(config.encoder, config.projection_head, config.classifier, config.distill)
        if config.memory.size:
            return SimCLRWithMemory(config.encoder, config.projection_head, _build_loss(config), config.memory)
        return SimCLR(config.encoder, config.projection_head, _build_loss(config))


def _build_loss(config: ModelConfig) -> ContrastiveLoss:
    return ContrastiveLoss(
        name=config.loss,
        temperature=config.temperature,
        learn_temperature=config.learn_temperature,
        normalize=config.normalize,
        semi_hard=config.semi_hard,
        margin=config.margin,
        exchange=config.exchange,
    )
