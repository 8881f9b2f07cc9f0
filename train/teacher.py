"""The teacher of a distillation: a classifier network out of a run's checkpoint, and what it asks of its student.

A teacher is a run of the method `supervised` (fine-tuning is one) or `distill`: a student may teach in its turn.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from model.build import build_method
from model.methods.distill import Distill
from model.methods.supervised import Supervised
from pipelines.build import Data, DataConfig
from train.checkpoint import load_checkpoint, read_sections
from train.config import PretrainConfig, config_from_dict
from train.initial_encoder import check_digest, check_fits, find_checkpoint
from train.labels import labels_of

logger = logging.getLogger(__name__)

CLASSIFIERS = ("supervised", "distill")


def teacher_config(path: str | Path) -> tuple[Path, PretrainConfig]:
    """The checkpoint that `train.teacher` means, and the configuration of its run; no tensors are read.

    Raises:
        ValueError: there is no such checkpoint, or its network is no classifier.
    """
    source = find_checkpoint(Path(path))
    config = config_from_dict(read_sections(source)["config"])
    if config.model.method not in CLASSIFIERS:
        raise ValueError(
            f"`train.teacher` must be a run of {' or '.join(CLASSIFIERS)}, {source} is of {config.model.method}; "
            "fine-tune it first: `python train/evaluate.py finetune`"
        )
    return source, config


def check_teacher(config: PretrainConfig, data: Data) -> None:
    """Refuse a distillation whose teacher, labels and student do not fit together.

    Args:
        config: of the student's run; of another method, nothing is checked.
        data: from `open_data`.

    Raises:
        ValueError: the teacher is missing, tells other classes apart, or knows images of another normalisation; or no
            image has a label although labels count, or a label is outside of the classes.
    """
    if config.model.method != "distill":
        return
    assert config.train.teacher is not None
    source, theirs = teacher_config(config.train.teacher)
    ours, num_classes = config.model.classifier.num_classes, theirs.model.classifier.num_classes
    if ours != num_classes:
        raise ValueError(
            f"`model.classifier.num_classes` must be the {num_classes} of the teacher {source}, got {ours}; set it so"
        )
    for name in ("mean", "std"):
        expected, found = (list(getattr(each.augment, name)) for each in (theirs, config))
        if expected != found:
            raise ValueError(
                f"`augment.{name}` must be the teacher's {expected}, since both see the same views, got {found}"
            )
    if config.model.distill.label_weight > 0.0:
        _check_labels(config.data, data, num_classes)


def load_teacher(config: PretrainConfig, method: Distill) -> None:
    """Give a student the teacher that `train.teacher` names (the live weights).

    Raises:
        ValueError: as `check_teacher`; or the checkpoint is damaged.
    """
    assert config.train.teacher is not None
    source, theirs = teacher_config(config.train.teacher)
    check_digest(source, config.train.teacher_sha256, "train.teacher")
    checkpoint = load_checkpoint(source)
    with torch.device("meta"):
        network = build_method(theirs.model, theirs.seed)
    assert isinstance(network, Supervised)
    check_fits(checkpoint.model, network.state_dict(), source, "its configuration is of another network")
    network.load_state_dict(checkpoint.model, assign=True)
    method.set_teacher(network)
    logger.info("learning from %s, at its step %s", source, checkpoint.position.get("step"))


def _check_labels(config: DataConfig, data: Data, num_classes: int) -> None:
    labels = labels_of(data)
    if labels is None:
        raise ValueError(
            f"`model.distill.label_weight` above 0 needs labels, {config.path} has none where `data.labelled` shows "
            "them; set it to 0, or name labelled images"
        )
    if (labels >= num_classes).any():
        raise ValueError(
            f"labels of {config.path} must be from 0 to {num_classes - 1}, the teacher's classes, got {labels.max()}"
        )
