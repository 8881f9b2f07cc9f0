"""Tiny checkpoints and labelled sets to evaluate, without training; and `train/evaluate.py` in this process."""

import sys
from dataclasses import replace

import pytest

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from tests.pipelines.betons import make_beton
from train.checkpoint import Checkpoint, checkpoint_path, save_checkpoint
from train.cli import run
from train.config import PretrainConfig, resolved_dict
from train.evaluate import main

CONFIG = PretrainConfig(
    name="run",
    data=DataConfig(path="set.beton"),
    augment=AugmentConfig(size=16),
    model=ModelConfig(
        encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
        projection_head=ProjectionHeadConfig(num_layers=3, hidden_dim=24, out_dim=8),
    ),
    seed=7,
)
"""Of a 3-layer head, as in SimCLR v2; h has 64 dimensions."""


def save_run(run_dir, step=4, *, seed=4, config=CONFIG, average_seed=None, score=None):
    """A checkpoint with the weights of a seed; returns the method that holds them, in evaluation mode."""
    method = build_method(config.model, seed)
    average = {} if average_seed is None else build_method(config.model, average_seed).state_dict()
    position = {"step": step, "scores": {"loss": float(step) if score is None else score}}
    save_checkpoint(
        checkpoint_path(run_dir, step),
        Checkpoint(model=method.state_dict(), average=average, config=resolved_dict(config), position=position),
    )
    return method.eval()


def supervised_config(head_layers):
    """A classifier that keeps the first layers of the head."""
    model = replace(CONFIG.model, method="supervised")
    model = replace(model, classifier=replace(model.classifier, num_classes=4, head_layers=head_layers))
    return replace(CONFIG, model=model, augment=replace(CONFIG.augment, recipe="supervised"))


def make_sets(root, counts=(64, 24), num_classes=4):
    """`root/train/set.beton` and `root/test/set.beton`, raw, with their images in `images/` beside them."""
    for name, count in zip(("train", "test"), counts, strict=True):
        (root / name).mkdir(parents=True)
        make_beton(root / name, [(24, 20)] * count, encode="raw", num_classes=num_classes)


def evaluate(*words):
    """`train/evaluate.py` in this process; returns its exit code. What it prints is pytest's to catch."""
    before = sys.argv
    sys.argv = ["train/evaluate.py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            run(main)
    finally:
        sys.argv = before
    return ended.value.code
