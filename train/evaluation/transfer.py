"""Transfer: what was learned on one set serves another one, by logistic regression or by fine-tuning.

`linear` is the protocol `logistic` on the other set: frozen features, penalties chosen on a validation split.

`finetune` is SimCLR v1, appendix B.8.2: the whole network and a new classifier, Nesterov momentum 0.9, batch 256,
20,000 steps; a grid of 7 rates from 0.0001 to 0.1 and 7 weight decays from 1e-6 to 1e-3, both evenly spaced in the
logarithm, and no decay; each decay is divided by the rate; random crops and flips. From random weights
(`representation: random`): 40,000 steps, 7 rates from 0.001 to 1 and 8 decays from 1e-5 to 10^-1.5. The setting is
chosen on a validation split of the training set; the network is then trained with it on all of that set, and measured
on the test set.

Where this differs: the paper does not say how the rate decays, here it is half a cosine; batch norm's running
statistics keep 0.9 a step, where the paper keeps max(1 − 10/s, 0.9) for s steps an epoch (the same up to 25,600
images); steps are rounded to whole epochs.

Legend: n samples of the training set.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.subset import SubsetConfig
from train.evaluation.labelled_run import Source, Training, check_fills_a_batch, open_source, run_config
from train.evaluation.network_accuracy import network_accuracy
from train.evaluation.protocol import EvaluationConfig, Result, check_single_process
from train.evaluation.transfer_grid import Setting, best_of, split_of, validate
from train.interruption import Interruption
from train.optim.lars import LARSConfig
from train.run import train
from train.schedule import ScheduleConfig

STEPS, STEPS_FROM_RANDOM = 20_000, 40_000
SPLIT_NAMES = frozenset({"train", "training", "trainval", "val", "test", "images", "set", "data"})


@dataclass(frozen=True, kw_only=True)
class TransferConfig(EvaluationConfig):
    """How the other set is learned."""

    mode: Literal["linear", "finetune"] = "linear"
    """`linear`: logistic regression on frozen features; `finetune`: the whole network is trained."""
    dataset: str | None = None
    """Name of the other set, for names of files; null: that of `train_data`, or of the folder that it
    lies in, where it is only called train or the like."""
    learning_rates: tuple[float, ...] | None = None
    """`finetune`: those that are tried, for a batch of 256; null: the paper's 7."""
    weight_decays: tuple[float, ...] | None = None
    """`finetune`: those that are tried, before they are divided by the rate; null: the paper's 8, one of them 0."""
    steps: int | None = None
    """`finetune`: of a training, rounded to whole epochs; null: 20,000, from random weights 40,000."""
    global_batch_size: int = 256
    """`finetune`: images in a step, over all ranks; rates are scaled by it."""
    micro_batch_size: int | None = None
    """`finetune`: images that a rank takes at a time, as `train.micro_batch_size`."""
    validation_fraction: float = 0.1
    """Share of each class of the training set that settings are chosen on, halves rounded down: of 0.1, classes of 5
    images or fewer give none."""
    select_by: Literal["top1", "mean_per_class"] = "top1"
    """What settings are compared by, on the validation split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("mode", ("linear", "finetune")), ("select_by", ("top1", "mean_per_class"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)}")
        for name in ("learning_rates", "weight_decays"):
            values = getattr(self, name)
            low = "above 0" if name == "learning_rates" else "from 0"
            if values is not None and not (
                values and all(math.isfinite(v) and (v > 0 or (v == 0 and low == "from 0")) for v in values)
            ):
                raise ValueError(f"`{name}` must be null or at least one finite number {low}, got {list(values)}")
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"`{name}` must name each once, got {list(values)}")
        for name in ("learning_rates", "weight_decays", "steps", "micro_batch_size"):
            if self.mode == "linear" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` must be null with `mode` linear, got {getattr(self, name)}; set `mode`")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be null or at least 1, got {self.steps}")
        if self.global_batch_size < 1:
            raise ValueError(f"`global_batch_size` must be at least 1, got {self.global_batch_size}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"`validation_fraction` must be in (0, 1), got {self.validation_fraction}")
        if self.dataset is not None and (self.dataset in {"", ".."} or Path(self.dataset).name != self.dataset):
            raise ValueError(f"`dataset` must be a plain name, got {self.dataset!r}")

    @property
    def dataset_name(self) -> str:
        """`dataset`, or what the path of the training set says."""
        if self.dataset is not None:
            return self.dataset
        path = Path(self.train_data).absolute()
        names = [path.stem if path.suffix == ".beton" else path.name, path.parent.name, path.parent.parent.name]
        return next((name for name in names if name and name.lower() not in SPLIT_NAMES), names[0])


def run_transfer(config: TransferConfig) -> Result:
    """Learn the other set, and measure it. With `finetune`, all ranks must call.

    Raises:
        ValueError: a file is missing or damaged, the classes do not fit, or the batch is too large.
        RunStopped: a run did not come to its end; the same command goes on.
    """
    return _finetune(config) if config.mode == "finetune" else _linear(config)


def grid_of(config: TransferConfig) -> list[Setting]:
    """The settings that are tried: each rate with each weight decay."""
    is_random = config.representation == "random"
    rates = config.learning_rates or tuple(np.logspace(-3, 0, 7) if is_random else np.logspace(-4, -1, 7))
    decays = config.weight_decays or (tuple(np.logspace(-5, -1.5, 8)) if is_random else (0.0, *np.logspace(-6, -3, 7)))
    return [Setting(learning_rate=float(rate), weight_decay=float(decay)) for rate in rates for decay in decays]


def training_of(config: TransferConfig, setting: Setting, num_images: int) -> Training:
    """How a setting trains on so many images."""
    steps = config.steps or (STEPS_FROM_RANDOM if config.representation == "random" else STEPS)
    return Training(
        optim=LARSConfig(
            name="sgd",
            base_lr=setting.learning_rate,
            lr_scaling="linear",
            momentum=0.9,
            nesterov=True,
            weight_decay=setting.weight_decay / setting.learning_rate,
            form="non_classic",  # the rate outside of the momentum
        ),
        schedule=ScheduleConfig(warmup_epochs=0.0),
        epochs=max(1, round(steps / (num_images // config.global_batch_size))),
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
    )


def _linear(config: TransferConfig) -> Result:
    check_single_process("`evaluate.py transfer` with `mode` linear")
    from train.evaluation.logistic_protocol import LogisticConfig, run_logistic  # takes scikit-learn with it

    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(EvaluationConfig)}
    result = run_logistic(LogisticConfig(**common, val_fraction=config.validation_fraction, select_by=config.select_by))
    suffix = "-".join(["linear", config.dataset_name, *([result.suffix] if result.suffix else [])])
    return dataclasses.replace(result, protocol="transfer", suffix=suffix)


def _finetune(config: TransferConfig) -> Result:
    source, settings = open_source(config), grid_of(config)
    num_images = len(source.train.labels)
    folder = source.folder / "-".join(
        ["transfer", config.dataset_name, config.representation, *_head(source), f"seed{config.seed}"]
    )
    tried: list[dict[str, Any]] = []
    best, chosen_by = settings[0], "given in advance"
    with Interruption() as interruption:
        if len(settings) > 1:
            subset, held_out = split_of(source, config.validation_fraction, config.seed)
            check_fills_a_batch(config.global_batch_size, num_images - len(held_out))
            for setting in settings:
                training = training_of(config, setting, num_images - len(held_out))
                run = run_config(
                    source, training, config, name=setting.name, subset=subset, seed=config.seed, runs_dir=folder
                )
                tried.append(
                    asdict(setting) | validate(run, source, held_out, interruption, batch_size=config.batch_size)
                )
            best = best_of(settings, tried, config.select_by)
            chosen_by = f"{config.select_by} on a validation split, {len(held_out)} of the {num_images} training images"
        check_fills_a_batch(config.global_batch_size, num_images)
        training = training_of(config, best, num_images)
        name = f"final-{best.name}"
        run = run_config(source, training, config, name=name, subset=SubsetConfig(), seed=config.seed, runs_dir=folder)
        train(run, interruption)
    measured = network_accuracy(
        run.run_dir,
        source.test,
        num_classes=source.num_classes,
        classes=source.classes,
        batch_size=config.batch_size,
    )
    return Result(
        protocol="transfer",
        figures={"all": [measured]},
        seeds={"all": [config.seed]},
        chosen=asdict(best),
        chosen_by=chosen_by,
        tried=tried,
        details={
            "starts_from": "the checkpoint" if source.starts_from_it else "random weights",
            "training": asdict(training),
            "steps": training.epochs * (num_images // config.global_batch_size),
            "runs": [str(run.run_dir)],
        },
        suffix=f"finetune-{config.dataset_name}",
        folder=source.folder,
    )


def _head(source: Source) -> list[str]:
    return [f"head{source.head_layers}"] if source.head_layers else []
