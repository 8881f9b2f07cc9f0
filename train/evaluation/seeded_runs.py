"""Networks trained on labelled images, one for each seed: from the labels that are asked for to a result.

Legend: n samples of the training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.subset import SubsetConfig
from train.config import PretrainConfig
from train.evaluation.classification import ClassificationMetrics
from train.evaluation.labelled_run import (
    Source,
    Training,
    check_fills_a_batch,
    chosen_rows,
    run_config,
    train_all,
)
from train.evaluation.network_accuracy import network_accuracy
from train.evaluation.protocol import EvaluationConfig, Result
from train.optim.lars import peak_lr


@dataclass(frozen=True, kw_only=True)
class SeededConfig(EvaluationConfig):
    """Which labels, and how often."""

    labels: SubsetConfig = SubsetConfig()
    """The labelled images that are used; by default all."""
    num_seeds: int = 1
    """Runs, from `labels.seed` and `seed` on: other images where they are drawn, and in any case other views, another
    order and other new weights. Mean, deviation and interval are over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_seeds < 1:
            raise ValueError(f"`num_seeds` must be at least 1, got {self.num_seeds}")


def share_of_labels(source: Source, labels: SubsetConfig) -> float:
    """The share of the training set's images whose labels are used, in (0, 1].

    Raises:
        ValueError: see `chosen_rows`.
    """
    return len(chosen_rows(source, labels)) / len(source.train.labels)


def train_seeds(source: Source, training: Training, config: SeededConfig, *, protocol: str, suffix: str) -> Result:
    """Train a network with each seed, and measure each at its last epoch. All ranks must call.

    Args:
        source: what is trained further, and on what.
        training: how.
        config: of the evaluation.
        protocol: its name.
        suffix: tells the result, and the runs, apart from those of other settings (and as many layers of the head).

    Raises:
        ValueError: the subset cannot be chosen or lacks a class, the batch does not fit, or a run's directory holds
            another run.
        RunStopped: a run did not come to its end; the same command goes on.
    """
    subsets = [subset_of_seed(config.labels, i) for i in range(config.num_seeds)]
    rows = [chosen_rows(source, subset) for subset in subsets]
    check_fills_a_batch(training.global_batch_size, min(map(len, rows)))
    seeds = [config.seed + i for i in range(config.num_seeds)]
    head = [f"head{source.head_layers}"] if source.head_layers else []
    runs = []
    for seed, subset in zip(seeds, subsets, strict=True):
        drawn = [] if subset.is_whole or subset.seed == seed else [f"subset{subset.seed}"]
        name = "-".join([protocol, config.representation, *head, suffix, *drawn, f"seed{seed}"]).replace("%", "pct")
        runs.append(run_config(source, training, config, name=name, subset=subset, seed=seed))
    measured = train_and_measure(runs, source, batch_size=config.batch_size)
    amount = amount_of(config.labels)
    return Result(
        protocol=protocol,
        figures={amount: measured},
        seeds={amount: seeds},
        chosen_by="given in advance; measured at the last epoch",
        details={
            "starts_from": "the checkpoint" if source.starts_from_it else "random weights",
            "head_layers": source.head_layers,
            "num_labelled": [len(chosen) for chosen in rows],
            "peak_lr": peak_lr(training.optim, training.global_batch_size),
            "training": asdict(training),
            "runs": [str(run.run_dir) for run in runs],
        },
        suffix=suffix,
        folder=source.folder,
    )


def train_and_measure(
    runs: Sequence[PretrainConfig], source: Source, *, batch_size: int
) -> list[ClassificationMetrics]:
    """Train each run from where it stands, then measure all of them on the test set. All ranks must call.

    Raises:
        ValueError: a run's configuration, data or directory cannot be used.
        RunStopped: a run did not come to its end.
    """
    train_all(runs)
    return [
        network_accuracy(
            run.run_dir,
            source.test,
            num_classes=source.num_classes,
            classes=source.classes,
            batch_size=batch_size,
        )
        for run in runs
    ]


def subset_of_seed(labels: SubsetConfig, i: int) -> SubsetConfig:
    """The subset of run `i`: another draw where there is one."""
    drawn = labels.fraction is not None or labels.per_class is not None
    return SubsetConfig(**asdict(labels) | {"seed": labels.seed + i}) if drawn else labels


def amount_of(labels: SubsetConfig) -> str:
    """The amount of labels in words: `1%`, a number of each class, the name of a list, or `all`."""
    if labels.fraction is not None:
        return f"{100 * labels.fraction:g}%"
    if labels.per_class is not None:
        return str(labels.per_class)
    return "all" if labels.list is None else Path(labels.list).stem


def suffix_of(labels: SubsetConfig, words: Sequence[str], given: dict[str, float | None]) -> str:
    """What a result's name says: the amount of labels, and of the other settings those that were given."""
    settings = [f"{name}{value:g}" for name, value in given.items() if value is not None]
    return "-".join([amount_of(labels), *words, *settings])
