"""A tiny set and configuration for both sides of the training contest."""

from pathlib import Path

from benchmarks.training_work import read_config
from tests.pipelines.betons import make_beton

ROOT = Path(__file__).parents[2]
NUM_IMAGES, BATCH_SIZE, SIDE = 20, 8, 16
TINY = [
    f"--augment.size={SIDE}",
    f"--data.global_batch_size={BATCH_SIZE}",
    "--model.encoder.width=0.125",
    "--model.projection_head.out_dim=16",
    "--schedule.warmup_epochs=2",
    "--train.epochs=5",
    "--train.precision=fp32",
]


def raw_set(folder):
    """A raw `.beton` of two classes."""
    return make_beton(folder, [(SIDE, SIDE)] * NUM_IMAGES, encode="raw").path


def tiny(beton, folder, *overrides):
    """A run on it."""
    return read_config(ROOT / "configs/study_cifar10.yaml", beton, folder / "runs", *TINY, *overrides)
