"""Fine-tuning: the whole pretrained network and a linear classifier are trained on few labels, or on all of them.

Recipes, as published; both have a cosine decay to 0, as google-research/simclr's code for every rate, no warm-up and no
weight decay, random crops and flips alone, and 60 epochs for 1 % of the labels, 30 for 10 %:

- `v1`: SimCLR v1, appendix B.5: Nesterov momentum 0.9, rate 0.05 · batch / 256; the batch was 4096. From h.
- `v2`: SimCLR v2, section 3.1: LARS, rate 0.005 · √batch, or 0.002 · √batch for networks that are wider than 1 or have
  selective kernels; the batch was 1024, 100 % of the labels take 30 epochs. From the head's first layer with 1 % and
  10 % of the labels (`head_layers: 1`), from h with all of them.

Batch norm is in training mode, over the global batch. The last epoch is what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.resnet import EncoderConfig
from train.evaluation.labelled_run import Training, open_source
from train.evaluation.protocol import Result
from train.evaluation.seeded_runs import SeededConfig, share_of_labels, suffix_of, train_seeds
from train.optim.lars import LARSConfig
from train.schedule import ScheduleConfig

EPOCHS_OF_FEW, EPOCHS = 60, 30
BATCH = 256
FEW = 0.05  # of the labels: between the 1 % and the 10 % that the epochs are published for


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SeededConfig):
    """How the labels are learned from."""

    recipe: Literal["v1", "v2"] = "v1"
    """Of which SimCLR; give `head_layers` 1 beside v2, as it had for 1 % and 10 % of the labels."""
    global_batch_size: int = BATCH
    """Images in a step, over all ranks; published: 4096 (v1), 1024 (v2)."""
    micro_batch_size: int | None = None
    """Images that a rank takes at a time, as `train.micro_batch_size`."""
    epochs: int | None = None
    """Passes over the labelled images; null: 60 where they are less than 5 % of the set, else 30."""
    base_lr: float | None = None
    """The rate before it is scaled by the batch; null: the recipe's."""
    weight_decay: float = 0.0
    """Published: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in ("v1", "v2"):
            raise ValueError(f"`recipe` must be one of v1, v2, got {self.recipe}")
        for name in ("global_batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")


def run_finetune(config: FinetuneConfig) -> Result:
    """Train and measure one network a seed. All ranks must call.

    Raises:
        ValueError: a file is missing or damaged, the classes do not fit, the subset cannot be chosen or lacks a class,
            or the batch does not fit.
        RunStopped: a run did not come to its end; the same command goes on.
    """
    source = open_source(config)
    share = share_of_labels(source, config.labels)
    given = {
        "batch": config.global_batch_size if config.global_batch_size != BATCH else None,
        "epochs": config.epochs,
        "lr": config.base_lr,
        "wd": config.weight_decay or None,  # the published none
    }
    suffix = suffix_of(config.labels, [] if config.recipe == "v1" else [config.recipe], given)
    training = training_of(config, source.config.model.encoder, share=share)
    return train_seeds(source, training, config, protocol="finetune", suffix=suffix)


def training_of(config: FinetuneConfig, encoder: EncoderConfig, *, share: float) -> Training:
    """How a recipe trains on a share of the labels, in (0, 1]."""
    if config.recipe == "v1":
        base_lr = 0.05 if config.base_lr is None else config.base_lr
        optim = LARSConfig(
            name="sgd",
            base_lr=base_lr,
            lr_scaling="linear",
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
            form="non_classic",  # the rate outside of the momentum, as tf.train.MomentumOptimizer has it
        )
    else:
        published = 0.002 if encoder.width > 1 or encoder.selective_kernel else 0.005
        base_lr = published if config.base_lr is None else config.base_lr
        optim = LARSConfig(
            name="lars", base_lr=base_lr, lr_scaling="sqrt", momentum=0.9, weight_decay=config.weight_decay
        )
    return Training(
        optim=optim,
        schedule=ScheduleConfig(warmup_epochs=0.0),
        epochs=config.epochs or (EPOCHS_OF_FEW if share < FEW else EPOCHS),
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
    )
