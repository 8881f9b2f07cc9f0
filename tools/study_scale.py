"""What a study was scaled down in, against the paper's setting: worked out from its configuration."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.resnet import ResNet
from tools.study_grid import Study
from train.config import PretrainConfig
from train.optim.lars import peak_lr

PAPER_IMAGES = 1_281_167  # of ImageNet's ILSVRC-2012 training set
PAPER_SIDE, PAPER_BATCH, PAPER_EPOCHS, PAPER_TEMPERATURE = 224, 4096, 100, 0.1
PAPER_HEAD_LAYERS = 2
PAPER_PROTOCOL = "linear"
EVALUATION = {
    "linear": "a linear classifier by SGD on frozen features",
    "logistic": "logistic regression by L-BFGS on frozen features",
    "knn": "k nearest neighbours of frozen features, which trains nothing",
}


def scaled_down(
    study: Study, base: PretrainConfig, *, num_images: int, num_test: int, num_classes: int, protocol: str
) -> list[tuple[str, str, str]]:
    """What differs from the paper: (what, there, here). What the study varies is left out.

    Args:
        study: whose cells.
        base: its configuration.
        num_images: that are pretrained on.
        num_test: images that accuracy is measured on.
        num_classes: of the evaluation.
        protocol: of the evaluation.
    """
    return [line for line in _compared(study, base, num_images, num_test, num_classes, protocol) if line[1] != line[2]]


def _compared(
    study: Study, base: PretrainConfig, num_images: int, num_test: int, num_classes: int, protocol: str
) -> Iterator[tuple[str, str, str]]:
    head = base.model.projection_head
    yield "images to pretrain on", f"{PAPER_IMAGES:,} (ImageNet)", f"{num_images:,}"
    yield "images to test on", "50,000 in 1000 classes", f"{num_test:,} in {num_classes} classes"
    yield "side of the views", f"{PAPER_SIDE} pixels", f"{base.augment.size} pixels"
    if "augment.recipe" not in study.varies:
        yield "augmentation", "simclr, strength 1, blur 0.5", _augmentation(base)
    yield "encoder", "ResNet-50, width 1, 23.5 million parameters", _encoder(base, study)
    if "model.projection_head.num_layers" not in study.varies:
        paper, ours = f"{PAPER_HEAD_LAYERS} layers", f"{head.num_layers} layers"
        if "model.projection_head.out_dim" not in study.varies:
            paper, ours = f"{paper} to 128", f"{ours} to {head.out_dim}"
        yield "projection head", paper, ours
    if "data.global_batch_size" not in study.varies:
        yield "batch", f"{PAPER_BATCH} images", f"{base.data.global_batch_size} images"
    if "train.epochs" not in study.varies:
        yield "epochs", str(PAPER_EPOCHS), str(base.train.epochs)
        if "data.global_batch_size" not in study.varies:
            steps = num_images // base.data.global_batch_size * base.train.epochs
            yield "steps", f"{PAPER_IMAGES // PAPER_BATCH * PAPER_EPOCHS:,}", f"{steps:,}"
    if "model.temperature" not in study.varies:
        yield "temperature", f"{PAPER_TEMPERATURE:g}", f"{base.model.temperature:g}"
    if "optim.base_lr" not in study.varies:
        yield "optimizer", "LARS, peak rate 4.8, decay 1e-06", _optimizer(base)
    if protocol in EVALUATION:  # table 3's MLPs are both ours and the paper's
        yield "evaluation", EVALUATION[PAPER_PROTOCOL], EVALUATION[protocol]


def _optimizer(base: PretrainConfig) -> str:
    rate = peak_lr(base.optim, base.data.global_batch_size)
    return f"{base.optim.name.upper()}, peak rate {rate:g}, decay {base.optim.weight_decay:g}"


def _augmentation(base: PretrainConfig) -> str:
    augment = base.augment
    blur = 0.5 if augment.blur_prob is None else augment.blur_prob
    area = "" if augment.crop_area is None else f", crop area {augment.crop_area[0]:g} to {augment.crop_area[1]:g}"
    return f"{augment.recipe}, strength {augment.color_strength:g}, blur {blur:g}{area}"


def _encoder(base: PretrainConfig, study: Study) -> str:
    encoder = base.model.encoder
    stem = "" if encoder.stem == "imagenet" else f", {encoder.stem} stem"
    if "model.encoder.depth" in study.varies:
        return f"varied{stem}"
    kernels = ", selective kernels" * encoder.selective_kernel
    millions = num_parameters(base) / 1e6
    return f"ResNet-{encoder.depth}, width {encoder.width:g}{stem}{kernels}, {millions:.3g} million parameters"


def num_parameters(base: PretrainConfig) -> int:
    """Of the encoder."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ResNet(base.model.encoder).parameters())
