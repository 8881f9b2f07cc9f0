"""Two views an image on the CPU: ours against the loaders and the decoder that people use.

Works, all over the same stored bytes with the same number of workers; each image becomes two views:

- `crop224`: random resized crop and flip of JPEGs of at most 500 pixels a side, quality 90, 4:2:0; uint8, which is the
  CPU's share of training on a GPU.
- `simclr224`: the whole SimCLR recipe (s = 1, blur) on the same files; float32 in [0, 1].
- `simclr32`: the recipe for CIFAR (s = 0.5, no blur) on raw images of at most 32 pixels a side; float32 in [0, 1].
- `startup`: from the start of a process to its first batch of crop224, with kernels cached where they can be.
- `crop224_workers1`, …: ours alone, with fewer workers.

`jpeg_decode` decodes each image once and makes no views: the limit of anything that decodes whole images.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant
from benchmarks.harness import Floor
from benchmarks.peers.dali_cpu import dali_cpu
from benchmarks.peers.jpeg_decode import jpeg_decode
from benchmarks.peers.lightly_pipeline import lightly
from benchmarks.peers.solo_learn_form import solo_learn
from benchmarks.peers.stock_ffcv import stock_ffcv
from benchmarks.peers.torchvision_pipeline import torchvision_io, torchvision_pil
from benchmarks.startup import startup_race
from benchmarks.twinview_loader import twinview, twinview_dali
from benchmarks.two_views import Augment, MakeBatches, consume

NUM_IMAGES_32, NUM_IMAGES_32_QUICK = 4096, 1024

CONTESTANTS: dict[str, MakeBatches] = {
    "twinview": twinview,
    "twinview_dali": twinview_dali,
    "torchvision": torchvision_pil,
    "torchvision_io": torchvision_io,
    "stock_ffcv": stock_ffcv,
    "dali_cpu": dali_cpu,
    "lightly": lightly,
    "solo_learn": solo_learn,
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the contestants do, and how much faster ours should be than each of the others."""

    name: str
    augment: Augment
    batch_size: int
    goals: dict[str, float]
    measured: dict[str, float]
    """Where that is short of the goal: the least that a machine of two or four cores gave (EPYC, November 2026)."""
    quick: tuple[str, ...]
    """Who races beside ours in a quick run."""
    without_goal: tuple[str, ...] = ()
    """Further contestants."""

    @property
    def contestants(self) -> list[str]:
        """Ours first; without the bare decoder, which makes no batches."""
        return ["twinview", *self.without_goal, *(name for name in self.goals if name in CONTESTANTS)]

    @property
    def floors(self) -> dict[str, Floor]:
        """What must hold."""
        return floors(self.goals, self.measured)


def floors(goals: dict[str, float], measured: dict[str, float]) -> dict[str, Floor]:
    """Two thirds of the goals, or of what was measured, so that noise fails nothing."""
    return {name: Floor(speed=2 / 3 * measured.get(name, goal), goal=goal) for name, goal in goals.items()}


CROP224 = Work(
    name="crop224",
    augment=Augment(size=224),
    batch_size=32,
    goals={"torchvision": 3.5, "torchvision_io": 2.4, "stock_ffcv": 3.5, "dali_cpu": 3.2, "jpeg_decode": 0.6},
    measured={"torchvision": 3.0, "torchvision_io": 1.7, "dali_cpu": 2.9},
    quick=("torchvision", "torchvision_io", "stock_ffcv", "jpeg_decode"),
    without_goal=("twinview_dali",),
)
# Stock FFCV has neither hue nor gray nor blur: it takes no part here.
SIMCLR224 = Work(
    name="simclr224",
    augment=Augment(size=224, color_strength=1.0, blur=True),
    batch_size=32,
    goals={"torchvision": 15.0, "torchvision_io": 15.0, "lightly": 6.5, "solo_learn": 6.5, "dali_cpu": 6.5},
    measured={"torchvision": 14.5, "torchvision_io": 14.5},
    quick=("torchvision", "lightly"),
    without_goal=("twinview_dali",),
)
SIMCLR32 = Work(
    name="simclr32",
    augment=Augment(size=32, color_strength=0.5),
    batch_size=256,
    goals={"torchvision": 70.0, "torchvision_io": 70.0, "lightly": 60.0, "solo_learn": 50.0, "dali_cpu": 20.0},
    measured={"torchvision": 48.0, "torchvision_io": 67.0, "lightly": 54.0, "solo_learn": 43.0, "dali_cpu": 9.0},
    quick=("torchvision",),
    without_goal=("twinview_dali",),
)
WORKS = (CROP224, SIMCLR224, SIMCLR32)
STARTUP_GOALS = {"stock_ffcv": 5.0}
STARTUP_ROUNDS = 2  # stock FFCV takes a quarter of a minute each time
MAX_COST_OF_WORKERS = 2.0  # CPU seconds an image, as a multiple of one worker's; two hyper-threads share a core


@pytest.fixture(scope="module")
def jpegs(bench: Bench, make_beton: Callable[..., Path]) -> Path:
    return make_beton("imagenet-sample.tar", bench.settings.images, "--encode", "jpeg")


@pytest.fixture(scope="module")
def small_images(bench: Bench, make_beton: Callable[..., Path]) -> Path:
    num_images = NUM_IMAGES_32_QUICK if bench.quick else NUM_IMAGES_32
    return make_beton("cifar10.tar.xz", num_images, "--encode", "raw", "--max-side", "32")


@pytest.mark.quick
def test_crop224(bench: Bench, jpegs: Path) -> None:
    arguments = (jpegs, bench.workers)
    decoder = Contestant(name="jpeg_decode", setup=jpeg_decode, arguments=arguments, step=CROP224.batch_size)
    everyone = [*contestants(CROP224, *arguments), decoder]
    bench.race("crop224", "images/s", everyone, CROP224.floors, quick=CROP224.quick)


@pytest.mark.quick
def test_simclr224(bench: Bench, jpegs: Path) -> None:
    everyone = contestants(SIMCLR224, jpegs, bench.workers)
    bench.race("simclr224", "images/s", everyone, SIMCLR224.floors, quick=SIMCLR224.quick)


@pytest.mark.quick
def test_simclr32(bench: Bench, small_images: Path) -> None:
    everyone = contestants(SIMCLR32, small_images, bench.workers)
    bench.race("simclr32", "images/s", everyone, SIMCLR32.floors, quick=SIMCLR32.quick)


def test_startup(bench: Bench, jpegs: Path) -> None:
    arguments = [str(jpegs), str(CROP224.batch_size), str(bench.workers)]
    commands = {name: ["-m", "benchmarks.first_batch", name, *arguments] for name in ("twinview", "stock_ffcv")}
    result = startup_race("startup", commands, rounds=min(bench.rounds, STARTUP_ROUNDS))
    bench.judge(result, floors(STARTUP_GOALS, {}))


@pytest.mark.parametrize("work", [CROP224, SIMCLR224], ids=lambda work: work.name)
def test_scaling(bench: Bench, jpegs: Path, work: Work) -> None:
    most = min(bench.workers, len(os.sched_getaffinity(0)))
    by_workers = {2**i: contestant("twinview", work, jpegs, 2**i) for i in range(most.bit_length())}
    bench.scaling(work.name, by_workers, max_cost=MAX_COST_OF_WORKERS)


def contestants(work: Work, beton: Path, workers: int) -> list[Contestant]:
    return [contestant(name, work, beton, workers) for name in work.contestants]


def contestant(name: str, work: Work, beton: Path, workers: int) -> Contestant:
    """It makes batches, as many for each of its workers."""
    arguments = (CONTESTANTS[name], beton, work.augment, work.batch_size, workers)
    return Contestant(name=name, setup=consume, arguments=arguments, step=work.batch_size * workers)
