"""What evaluations that train a network have in common: from a pretrained run to runs on labelled images.

Such a run is one of the training loop's, with the method `supervised`: engine, loaders, checkpoints, resume and ranks
are those of pretraining. It takes from the pretrained run the network, the side and normalisation of the views, the
loader and the precision, and lies in the results folder of that run. The same command goes on with it after an
interruption, or, where it has come to its end, measures it again.

Legend: n samples of the training set, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.build import ModelConfig
from model.methods.supervised import ClassifierConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig, ImageFolder, open_data
from pipelines.subset import SubsetConfig
from train.checkpoint import load_checkpoint
from train.config import PretrainConfig, TrainConfig, config_from_dict
from train.evaluation.checks import check_splits
from train.evaluation.labelled_data import LabelledData, open_labelled
from train.evaluation.protocol import EvaluationConfig
from train.evaluation.representation import build_network
from train.evaluation.results import sha256_of
from train.initial_encoder import find_checkpoint, results_dir
from train.interruption import Interruption
from train.online.config import OnlineConfig
from train.optim.lars import LARSConfig
from train.run import train
from train.schedule import ScheduleConfig

AugmentRecipe = Literal["supervised", "supervised_color"]

NUM_NAMED = 3  # of the classes that a message is about


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What is trained further, and on what.

    Attributes:
        path: the pretrained run's checkpoint.
        digest: of that file: a run that began with it does not go on when another one has its name.
        config: of the pretrained run.
        head_layers: of its projection head that are kept.
        starts_from_it: whether its weights are where training starts; else they are those of the seed.
        train: the training set.
        test: the test set.
        classes: names by label, if they are known.
        num_classes: C.
        folder: where results go, and the runs of the evaluation lie.
    """

    path: Path
    digest: str
    config: PretrainConfig
    head_layers: int
    starts_from_it: bool
    train: LabelledData
    test: LabelledData
    classes: list[str] | None
    num_classes: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained on labelled images."""

    optim: LARSConfig
    schedule: ScheduleConfig
    epochs: int
    global_batch_size: int
    micro_batch_size: int | None = None
    augment: AugmentRecipe = "supervised"


def open_source(config: EvaluationConfig) -> Source:
    """Open a checkpoint and both sets, as an evaluation asks for; nothing is made on the disk.

    Raises:
        ValueError: a file is missing or damaged, the classes do not fit, or the checkpoint has no such layers.
    """
    if config.representation == "pixels":
        raise ValueError("`representation` must be learned or random for a network that is trained, got pixels")
    if config.weights != "live":
        raise ValueError(f"`weights` must be live for a network that is trained further, got {config.weights}")
    path = find_checkpoint(Path(config.checkpoint), config.which).absolute()
    checkpoint = load_checkpoint(path)
    network = build_network(config.representation, checkpoint, source=path)
    train_data, test_data = open_labelled(config.train_data, "train"), open_labelled(config.test_data, "test")
    classes, num_classes = check_splits(train_data, test_data)
    return Source(
        path=path,
        digest=sha256_of(path),
        config=config_from_dict(checkpoint.config),
        head_layers=network.resolve(config.head_layers),
        starts_from_it=config.representation == "learned",
        train=train_data,
        test=test_data,
        classes=classes,
        num_classes=num_classes,
        folder=Path(config.output_dir).absolute() if config.output_dir else results_dir(path) / "evaluation",
    )


def run_config(
    source: Source,
    training: Training,
    config: EvaluationConfig,
    *,
    name: str,
    subset: SubsetConfig,
    seed: int,
    runs_dir: Path | None = None,
) -> PretrainConfig:
    """The run that trains the network of `source` on labels.

    Args:
        source: what is trained further, and on what.
        training: how.
        config: of the evaluation.
        name: of the run's directory.
        subset: of the training set that is used.
        seed: of the weights that are new, the order and the views.
        runs_dir: where the run lies; None: in the folder of the results.
    """
    theirs = source.config
    return PretrainConfig(
        name=name,
        runs_dir=str(runs_dir or source.folder),
        seed=seed,
        data=_data(theirs.data, source.train, subset, training.global_batch_size),
        augment=_augment(theirs.augment, training.augment),
        model=ModelConfig(
            method="supervised",
            encoder=theirs.model.encoder,
            projection_head=theirs.model.projection_head,
            classifier=ClassifierConfig(num_classes=source.num_classes, head_layers=source.head_layers),
            norm_group_size=theirs.model.norm_group_size,
        ),
        optim=training.optim,
        schedule=training.schedule,
        train=_train(theirs.train, training, config, source),
        online=OnlineConfig(linear_probe=False, knn_every_epochs=0, watch_collapse=False),
        log=theirs.log,
    )


def train_all(runs: Sequence[PretrainConfig]) -> None:
    """Train one run after the other, each from where it stands. All ranks must call.

    Raises:
        ValueError: a run's configuration, data or directory cannot be used.
        RunStopped: a run did not come to its end.
    """
    with Interruption() as interruption:
        for run in runs:
            train(run, interruption)


def chosen_rows(source: Source, subset: SubsetConfig) -> NDArray[np.int64]:
    """The rows of the training set that a subset of it holds, int64, rising.

    Raises:
        ValueError: the set has no such subset, or that lacks a class.
    """
    if subset.is_whole:
        return np.arange(len(source.train.labels))
    loader: Literal["folder", "ffcv"] = "folder" if isinstance(source.train.data, ImageFolder) else "ffcv"
    opened = open_data(DataConfig(path=source.train.path, loader=loader, subset=subset))
    rows: NDArray[np.int64] = opened.rows  # type: ignore[union-attr]
    missing = np.flatnonzero(np.bincount(source.train.labels[rows], minlength=source.num_classes) == 0)
    if len(missing):
        names = [f"{k} ({source.classes[k]})" if source.classes else str(k) for k in missing[:NUM_NAMED].tolist()]
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"the labelled images must be of all {source.num_classes} classes, {subset.list or 'the subset'} has none "
            f"of class {', '.join(names)}{more}; name some"
        )
    return rows


def check_fills_a_batch(global_batch_size: int, num_images: int) -> None:
    """Refuse a batch that the labelled images cannot fill once.

    Raises:
        ValueError: names both sizes.
    """
    if global_batch_size > num_images:
        raise ValueError(
            f"`global_batch_size` must not exceed the {num_images} labelled images, got {global_batch_size}; use "
            f"{num_images} or less"
        )


def _data(theirs: DataConfig, data: LabelledData, subset: SubsetConfig, global_batch_size: int) -> DataConfig:
    """The pretrained run's loader over other images; for a folder, the one that reads folders."""
    changes: dict[str, object] = {"path": data.path, "subset": subset, "global_batch_size": global_batch_size}
    if isinstance(data.data, ImageFolder):
        changes |= {"loader": "folder", "photometric": "ours", "geometry": "auto"}
    elif theirs.loader == "folder":
        changes |= {"loader": "ffcv"}
    return dataclasses.replace(theirs, **changes)  # type: ignore[arg-type]


def _augment(theirs: AugmentConfig, recipe: AugmentRecipe) -> AugmentConfig:
    """One view of the pretrained run's side, filter, crops, flips and normalisation."""
    kept = ("size", "interpolation", "crop_area", "flip_prob", "mean", "std")
    colors = ("color_strength", "blur_prob") if recipe == "supervised_color" else ()
    return AugmentConfig(recipe=recipe, **{name: getattr(theirs, name) for name in (*kept, *colors)})


def _train(theirs: TrainConfig, training: Training, config: EvaluationConfig, source: Source) -> TrainConfig:
    """The pretrained run's machine: what is trained for is another thing, and so are checkpoints and averages."""
    return dataclasses.replace(
        theirs,
        keep_best="none",
        keep_every_epochs=0,
        ema_decay=0.0,
        gradient_clipping=0.0,
        teacher=None,
        teacher_sha256=None,
        epochs=training.epochs,
        micro_batch_size=training.micro_batch_size,
        keep_checkpoints=1,
        device=config.device,
        initial_encoder=str(source.path) if source.starts_from_it else None,
        initial_encoder_sha256=source.digest if source.starts_from_it else None,
    )
