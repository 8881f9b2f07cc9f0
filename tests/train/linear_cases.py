"""Small sets of digits and a tiny network with random weights, for tests of the linear evaluation."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from tools.convert import convert
from tools.image_encoding import EncodeOptions
from train.checkpoint import Checkpoint, checkpoint_path, save_checkpoint
from train.config import PretrainConfig, resolved_dict

SIDE, CLASSES, TRAIN, TEST = 8, 5, 100, 60
CPU = torch.device("cpu")


def pretraining():
    return PretrainConfig(
        name="run",
        data=DataConfig(path="train.beton", global_batch_size=16),
        augment=AugmentConfig(
            size=SIDE, crop_area=(0.5, 1.0), flip_prob=0.5, mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3)
        ),
        model=ModelConfig(
            encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
            projection_head=ProjectionHeadConfig(num_layers=2, out_dim=8),
        ),
    )


def make_case(folder):
    """Write `train.beton`, `test.beton` and a run directory `run` with a checkpoint; returns the folder."""
    digits = load_digits()
    rows = np.flatnonzero(digits.target < CLASSES)
    for split, of_split in (("train", rows[:TRAIN]), ("test", rows[TRAIN : TRAIN + TEST])):
        for row in of_split.tolist():
            path = folder / split / str(digits.target[row]) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).save(path)
        convert(folder / split, folder / f"{split}.beton", EncodeOptions(encode="raw"), workers=1)
    config = pretraining()
    model = build_method(config.model, seed=7).state_dict()
    for name, tensor in model.items():
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1.0)  # open the residual blocks, as training does
    checkpoint = Checkpoint(model=model, position={"step": 12}, config=resolved_dict(config))
    path = checkpoint_path(folder / "run", 12)
    path.parent.mkdir(parents=True)
    save_checkpoint(path, checkpoint)
    return folder


def options(folder, **others):
    """Of a `LinearConfig` on such a folder."""
    return {
        "checkpoint": str(folder / "run"),
        "train_data": str(folder / "train.beton"),
        "test_data": str(folder / "test.beton"),
        "device": "cpu",
        "batch_size": 7,
        "global_batch_size": 16,
        "epochs": 3,
    } | others
