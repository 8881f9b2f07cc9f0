"""Distillation: a student learns from what a fine-tuned network says of images whose labels are not used.

SimCLR v2 (Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners", sections 2 and 3.1):
crops and flips alone; LARS with momentum 0.9 and rate 0.1 · √batch, 5 % of the epochs of warm-up and a cosine after
them, weight decay 1e-4, 400 epochs, batches of 4096; τ = 0.1 for a student of its teacher's architecture, 1.0 for a
smaller one. The student has no layers of the projection head. It starts from random weights: the paper does not say so,
but the ResNet-50 of its table 2, trained like its students on the labels alone, comes to 12.3 %, where a pretrained one
comes to 57.9 %. `checkpoint` names a pretrained run to start from all the same.

The last epoch is what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.methods.distill import DistillConfig
from model.resnet import EncoderConfig
from pipelines.build import DataConfig, Subset, open_data
from pipelines.subset import SubsetConfig
from train.checkpoint import read_sections
from train.config import PretrainConfig, config_from_dict
from train.evaluation.checks import check_classes
from train.evaluation.labelled_data import LabelledData, open_labelled
from train.evaluation.labelled_run import Source, Training, check_fills_a_batch, run_config
from train.evaluation.protocol import EvaluationConfig, Result
from train.evaluation.results import ALL_LABELS, sha256_of
from train.evaluation.seeded_runs import amount_of, train_and_measure
from train.initial_encoder import find_checkpoint, results_dir
from train.labels import labels_of
from train.optim.lars import LARSConfig, peak_lr
from train.schedule import ScheduleConfig
from train.teacher import teacher_config

WARMUP_SHARE = 0.05  # of the epochs


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student's encoder, where it is another than its teacher's (or than that of the run that it starts from)."""

    depth: int | None = None
    """Of the ResNet."""
    width: float | None = None
    """Of its channels."""
    selective_kernel: bool | None = None
    """Whether it has selective kernels."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(EvaluationConfig):
    """Who learns from whom, and how."""

    checkpoint: str = ""
    """A pretrained run, or its checkpoint, whose encoder the student starts from; empty: from random weights."""
    teacher: str
    """A run of finetune, supervised or distill, or its checkpoint."""
    train_data: str
    """The images that are learned from: a `.beton` or a folder, with or without labels."""
    student: StudentConfig = StudentConfig()
    temperature: float | None = None
    """τ; null: 0.1 where the student's encoder is of its teacher's architecture, else 1.0."""
    label_weight: float = 0.0
    """α: weight of the labels' cross-entropy beside distillation; 0: no label is looked at."""
    labels: SubsetConfig = SubsetConfig()
    """With `label_weight`: the images whose labels are used; by default all. Give those that the teacher had."""
    num_seeds: int = 1
    """Students, from `seed` on; mean, deviation and interval are over them."""
    global_batch_size: int = 256
    """Images in a step, over all ranks; published: 4096."""
    micro_batch_size: int | None = None
    """Images that a rank takes at a time, as `train.micro_batch_size`; the teacher then sees each image twice."""
    epochs: int = 400
    """Passes over the images."""
    base_lr: float = 0.1
    """The rate of LARS before it is multiplied by √batch."""
    weight_decay: float = 1e-4
    """Of weights that are no biases and of no norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_seeds", "global_batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.representation != "learned":
            raise ValueError(
                f"`representation` must be learned for distillation, got {self.representation}; leave `checkpoint` out "
                "for a student of random weights"
            )
        if self.weights != "live":
            raise ValueError(f"`weights` must be live for a network that is trained further, got {self.weights}")
        if self.head_layers < 0 or (self.head_layers and not self.checkpoint):
            raise ValueError(
                f"`head_layers` must be 0, or layers that `checkpoint` has, got {self.head_layers}"
                + ("" if self.checkpoint else " without a `checkpoint`")
            )
        if not self.labels.is_whole and self.label_weight == 0.0:
            raise ValueError("`labels` needs a `label_weight` above 0, got 0.0: no label is looked at; leave it out")


def run_distillation(config: DistillationConfig) -> Result:
    """Train and measure one student a seed. All ranks must call.

    Raises:
        ValueError: a file is missing or damaged; teacher, student, data and classes do not fit; or the batch does not.
        RunStopped: a run did not come to its end; the same command goes on.
    """
    teacher, theirs = teacher_config(config.teacher)
    source = _source(config, teacher.absolute(), theirs)
    check_fills_a_batch(config.global_batch_size, len(source.train.labels))
    student = source.config.model.encoder
    alike = student == theirs.model.encoder
    temperature = (0.1 if alike else 1.0) if config.temperature is None else config.temperature
    distill = DistillConfig(temperature=temperature, label_weight=config.label_weight)
    training = Training(
        optim=LARSConfig(base_lr=config.base_lr, lr_scaling="sqrt", momentum=0.9, weight_decay=config.weight_decay),
        schedule=ScheduleConfig(warmup_epochs=WARMUP_SHARE * config.epochs),
        epochs=config.epochs,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
    )
    amount = _amount(_labels_behind(theirs) + [config.labels] * (config.label_weight > 0))
    taught_by = {"teacher": str(teacher.absolute()), "teacher_sha256": sha256_of(teacher)}
    seeds = [config.seed + i for i in range(config.num_seeds)]
    suffix = _suffix(config, student, alike=alike)
    runs = [
        _run(source, training, config, distill, taught_by, name=f"distill-{suffix}-seed{seed}", seed=seed)
        for seed in seeds
    ]
    measured = train_and_measure(runs, source, batch_size=config.batch_size)
    details: dict[str, Any] = {
        **taught_by,
        "teacher_encoder": asdict(theirs.model.encoder),
        "student_encoder": asdict(student),
        "starts_from": "the checkpoint" if config.checkpoint else "random weights",
        "distill": asdict(distill),
        "peak_lr": peak_lr(training.optim, training.global_batch_size),
        "training": asdict(training),
        "runs": [str(run.run_dir) for run in runs],
    }
    return Result(
        protocol="distill",
        figures={amount: measured},
        seeds={amount: seeds},
        chosen_by="given in advance; measured at the last epoch",
        details=details,
        suffix=suffix,
        folder=source.folder,
    )


def _source(config: DistillationConfig, teacher: Path, theirs: PretrainConfig) -> Source:
    """Both sets; and the run that the student takes its network and its machine from, with the teacher's views."""
    start = find_checkpoint(Path(config.checkpoint), config.which).absolute() if config.checkpoint else None
    train, test = _open_images(config.train_data), open_labelled(config.test_data, "test")
    if train.classes is not None and test.classes is not None:
        check_classes(train.classes, test.classes, train.path, test.path)
    num_classes = theirs.model.classifier.num_classes
    found = int(test.labels.max()) + 1 if test.classes is None else len(test.classes)
    if found > num_classes or (test.classes is not None and found != num_classes):
        raise ValueError(
            f"`test_data` must have the teacher's {num_classes} classes, {test.path} has {found}; give the test set of "
            f"what {teacher} was trained on"
        )
    base = theirs if start is None else config_from_dict(read_sections(start)["config"])
    changes = {name: value for name, value in asdict(config.student).items() if value is not None}
    encoder = dataclasses.replace(base.model.encoder, **changes)
    folder = results_dir(start or teacher) / "evaluation"
    return Source(
        path=start or teacher,
        digest=sha256_of(start or teacher),
        config=dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, encoder=encoder),
            augment=dataclasses.replace(base.augment, mean=theirs.augment.mean, std=theirs.augment.std),
        ),
        head_layers=config.head_layers,
        starts_from_it=start is not None,
        train=train,
        test=test,
        classes=test.classes,
        num_classes=num_classes,
        folder=Path(config.output_dir).absolute() if config.output_dir else folder,
    )


def _open_images(path: str) -> LabelledData:
    """A training set that need not have labels."""
    data = open_data(DataConfig(path=path, loader="folder" if Path(path).is_dir() else "ffcv"))
    assert not isinstance(data, Subset)
    labels = labels_of(data)
    if labels is not None and (labels >= 0).all():
        return open_labelled(path, "train")
    unknown = np.full(data.num_samples, -1)
    return LabelledData(split="train", path=path, data=data, labels=unknown, classes=None, identity={})


def _labels_behind(run: PretrainConfig) -> list[SubsetConfig]:
    """Those that a teacher goes back to: its own, and its teachers'.

    Raises:
        ValueError: it was taught by a run that is not there any more.
    """
    if run.model.method == "supervised":
        return [run.data.subset]
    assert run.train.teacher is not None
    try:
        _, theirs = teacher_config(run.train.teacher)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`teacher` was taught by {run.train.teacher}, which tells how many labels it goes back to and must be "
            f"there, got: {error}"
        ) from error
    return _labels_behind(theirs) + [run.data.labelled] * (run.model.distill.label_weight > 0)


def _amount(labels: Sequence[SubsetConfig]) -> str:
    """How many labels a student knows of, in words: `1%`, or `1%+10%` where they are not the same ones."""
    if any(each.is_whole for each in labels):
        return ALL_LABELS
    return "+".join(amount_of(each) for each in dict.fromkeys(labels))


def _suffix(config: DistillationConfig, student: EncoderConfig, *, alike: bool) -> str:
    """Tells results apart: who learned, from where, and what else."""
    size = f"r{student.depth}-{student.width:g}x" + ("-sk" if student.selective_kernel else "")
    parts = ["self" if alike else size]
    parts += ["pretrained"] if config.checkpoint else []
    parts += [f"labels{amount_of(config.labels)}".replace("%", "pct")] if config.label_weight else []
    return "-".join(parts)


def _run(
    source: Source,
    training: Training,
    config: DistillationConfig,
    distill: DistillConfig,
    taught_by: dict[str, str],
    *,
    name: str,
    seed: int,
) -> PretrainConfig:
    """A run on labelled images, with a teacher in the place of the labels."""
    run = run_config(source, training, config, name=name, subset=SubsetConfig(), seed=seed)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, labelled=config.labels),
        model=dataclasses.replace(run.model, method="distill", distill=distill),
        train=dataclasses.replace(run.train, teacher=taught_by["teacher"], teacher_sha256=taught_by["teacher_sha256"]),
    )
