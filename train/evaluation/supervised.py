"""The supervised baseline: the network of a pretrained run, trained with labels from random weights.

Network, loader, batch, epochs, schedule and precision are those of the run that it is compared with. The papers name no
optimizer for their supervised networks; ours is `sgd`, that of Goyal et al. 2017, "Accurate, Large Minibatch SGD":
Nesterov momentum 0.9, rate 0.1 · batch / 256, weight decay 1e-4. `run` takes the pretrained run's, LARS as a rule.

`augment: supervised` crops and flips; `supervised_color` is SimCLR's whole augmentation of one view, with which
SimCLR v1, section 3.3 and appendix B.3, compares its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from train.evaluation.labelled_run import AugmentRecipe, Source, Training, open_source
from train.evaluation.protocol import Representation, Result
from train.evaluation.seeded_runs import SeededConfig, suffix_of, train_seeds
from train.optim.lars import LARSConfig
from train.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(SeededConfig):
    """How the baseline is trained; what is not here is that of the run."""

    representation: Representation = "random"
    """Where it starts: `random` alone."""
    augment: AugmentRecipe = "supervised"
    """`supervised`: crops and flips; `supervised_color`: one of SimCLR's views."""
    optimizer: Literal["sgd", "run"] = "sgd"
    """`sgd`: Nesterov momentum; `run`: the pretrained run's."""
    base_lr: float | None = None
    """The rate before it is scaled by the batch; null: the optimizer's."""
    weight_decay: float | None = None
    """Null: the optimizer's."""
    epochs: int | None = None
    """Null: the run's; else its warm-up is shortened or lengthened with it."""
    global_batch_size: int | None = None
    """Null: the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.representation != "random":
            raise ValueError(
                f"`representation` must be random for the baseline, got {self.representation}; `evaluate.py finetune` "
                "starts from a checkpoint"
            )
        if self.optimizer not in ("sgd", "run"):
            raise ValueError(f"`optimizer` must be one of sgd, run, got {self.optimizer}")
        for name in ("epochs", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")


def run_supervised(config: SupervisedConfig) -> Result:
    """Train and measure one network a seed. All ranks must call.

    Raises:
        ValueError: a file is missing or damaged, the classes do not fit, the subset cannot be chosen or lacks a class,
            or the batch does not fit.
        RunStopped: a run did not come to its end; the same command goes on.
    """
    source = open_source(config)
    words = [str(config.augment)] * (config.augment != "supervised") + [str(config.optimizer)] * (
        config.optimizer != "sgd"
    )
    given = {
        "batch": config.global_batch_size,
        "epochs": config.epochs,
        "lr": config.base_lr,
        "wd": config.weight_decay,
    }
    suffix = suffix_of(config.labels, words, given)
    return train_seeds(source, training_of(config, source), config, protocol="supervised", suffix=suffix)


def training_of(config: SupervisedConfig, source: Source) -> Training:
    """How the baseline is trained."""
    theirs = source.config
    published = LARSConfig(
        name="sgd", base_lr=0.1, lr_scaling="linear", momentum=0.9, nesterov=True, weight_decay=1e-4, form="non_classic"
    )
    optim = published if config.optimizer == "sgd" else theirs.optim
    epochs = config.epochs or theirs.train.epochs
    return Training(
        optim=dataclasses.replace(
            optim,
            base_lr=optim.base_lr if config.base_lr is None else config.base_lr,
            weight_decay=optim.weight_decay if config.weight_decay is None else config.weight_decay,
        ),
        schedule=stretched(theirs.schedule, epochs / theirs.train.epochs),
        epochs=epochs,
        global_batch_size=config.global_batch_size or theirs.data.global_batch_size,
        micro_batch_size=theirs.train.micro_batch_size,
        augment=config.augment,
    )


def stretched(schedule: ScheduleConfig, factor: float) -> ScheduleConfig:
    """The same schedule of a training that is so many times as long."""
    if factor == 1:
        return schedule
    epochs, steps, sizes = schedule.warmup_epochs, schedule.warmup_steps, schedule.sizes
    return dataclasses.replace(
        schedule,
        warmup_epochs=None if epochs is None else epochs * factor,
        warmup_steps=None if steps is None else int(steps * factor),
        sizes=None if sizes is None else tuple({int(first * factor): side for first, side in sizes}.items()),
    )
