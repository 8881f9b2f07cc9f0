"""A whole pretraining step: ours against lightly's transform, head, loss and LARS under torch's DataLoader.

The demo: scikit-learn's digits, ResNet-10 with 16 channels in the stem, batches of 256 images, two views of 32²,
float32. Same network, initial weights, batches, schedule and recipe; `benchmarks.training_work` says who takes part and
what each changes. Everyone has the same two cores for training and loading together, and computes with two threads;
lightly's script is entered with as many workers as cores, and with twice as many. An item is a source image.

Most of a step is the network's own convolutions, which all compute with torch: where nothing else took any time, ours
would be no faster than `lightly_views`. The longer contest, with what was learned: `python -m
benchmarks.training_contest`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.conftest import Bench
from benchmarks.harness import Floor
from benchmarks.training_work import (
    ROOT,
    Script,
    lightly_contestant,
    make_digits,
    read_config,
    twinview_contestant,
)
from pipelines.build import open_data
from train.config import PretrainConfig

CORES = 2
MAX_ROUNDS = 3  # a turn is an epoch of five steps, seconds on a busy machine
EPOCHS = 1000  # of the schedule; nobody gets so far
FLOORS = {
    "lightly_workers2": Floor(speed=1.3, goal=3.0),
    "lightly_workers4": Floor(speed=1.3, goal=3.0),
    "lightly_views": Floor(speed=0.75, goal=1.0),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    pytest.importorskip("lightly", reason="the peer needs requirements-bench.txt")
    folder = tmp_path_factory.mktemp("training")
    make_digits(folder / "digits")
    file, beton = ROOT / "configs/digits_demo.yaml", folder / "digits/train.beton"
    return read_config(file, beton, folder / "runs", f"--train.epochs={EPOCHS}")


def test_training(bench: Bench, config: PretrainConfig) -> None:
    num_images = open_data(config.data).num_samples
    scripts = {
        "lightly_workers2": Script(threads=CORES, workers=CORES),
        "lightly_workers4": Script(threads=CORES, workers=2 * CORES),
        "lightly_layout": Script(threads=CORES, workers=CORES, layout=True),
        "lightly_views": Script(threads=CORES, layout=True, our_views=True),
    }
    contestants = [
        twinview_contestant("twinview", config, num_images, CORES),
        *(lightly_contestant(name, config, num_images, CORES, script) for name, script in scripts.items()),
    ]
    bench.race("training_digits", "images/s", contestants, FLOORS, max_rounds=MAX_ROUNDS)


@pytest.mark.usefixtures("large")
def test_folder_loader(bench: Bench, config: PretrainConfig) -> None:
    num_images = open_data(config.data).num_samples
    images = str(Path(config.data.path).with_suffix(""))
    folder = replace(config, data=replace(config.data, path=images, loader="folder"))
    contestants = [
        twinview_contestant("twinview_beton", config, num_images, CORES),
        twinview_contestant("twinview_folder", folder, num_images, CORES),
    ]
    bench.race("training_folder", "images/s", contestants, {}, max_rounds=MAX_ROUNDS)
