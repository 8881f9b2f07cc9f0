"""What is saved by decoding less than a whole image: ours against itself.

- `rows1`, `rows2`: one, or two, 224² crops of converted JPEGs, with the index of their rows and without it.
- `scaled`: two 224² crops of large JPEGs (three times the side of the images given), at half or quarter scale where no
  window becomes smaller than its view, and always whole.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.conftest import ROOT, Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from benchmarks.twinview_loader import epochs_of, prepare_process, repeated
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import open_beton
from pipelines.decode.rows import INDEX_NAME
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe

BATCH_SIZE = 32
NUM_LARGE, ENLARGED = 64, 3

# Images differ in what they cost: turns are long enough for everyone to meet about the same ones.
STEP = 4 * BATCH_SIZE

# A third of the gain that was measured (EPYC, November 2026), which is small and which other load hides: 1.28, 1.08
# and 1.48.
FLOORS = {
    "rows1": Floor(speed=1.1, goal=1.28),
    "rows2": Floor(speed=0.95, goal=1.08),
    "scaled": Floor(speed=1.15, goal=1.48),
}


@pytest.fixture(scope="module")
def with_index(bench: Bench, make_beton: Callable[..., Path]) -> Path:
    return make_beton("imagenet-sample.tar", bench.settings.images, "--encode", "jpeg")


@pytest.fixture(scope="module")
def without_index(with_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bytes, but for the name by which the index is known."""
    path = tmp_path_factory.mktemp("without") / "set.beton"
    path.write_bytes(with_index.read_bytes().replace(INDEX_NAME, b"NOTHING\0"))
    return path


@pytest.fixture(scope="module")
def large(with_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "images" / "class").mkdir(parents=True)
    sources = sorted((with_index.parent / "images").rglob("*.*"))[:NUM_LARGE]
    for i, source in enumerate(sources):
        with Image.open(source) as image:
            size = (image.width * ENLARGED, image.height * ENLARGED)
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
                folder / "images" / "class" / f"{i:04d}.jpg", quality=90
            )
    command = [sys.executable, "-m", "tools.convert", str(folder / "images"), str(folder / "set.beton")]
    subprocess.run([*command, "--encode", "keep"], check=True, cwd=ROOT)
    return folder / "set.beton"


@pytest.mark.parametrize("num_views", [pytest.param(1, marks=pytest.mark.quick), 2])
def test_rows(bench: Bench, with_index: Path, without_index: Path, num_views: int) -> None:
    work = f"rows{num_views}"
    contestants = [
        _contestant("twinview", with_index, num_views, bench.workers),
        _contestant("whole", without_index, num_views, bench.workers),
    ]
    bench.race(work, "images/s", contestants, {"whole": FLOORS[work]})


def test_scaled(bench: Bench, large: Path) -> None:
    contestants = [
        _contestant(name, large, 2, bench.workers, scaled=name == "twinview") for name in ("twinview", "whole")
    ]
    bench.race("scaled", "images/s", contestants, {"whole": FLOORS["scaled"]})


def _contestant(name: str, beton: Path, num_views: int, workers: int, *, scaled: bool = False) -> Contestant:
    return Contestant(name=name, setup=_crops, arguments=(beton, num_views, workers, scaled), step=STEP)


def _crops(path: Path, num_views: int, workers: int, scaled: bool) -> Run:
    prepare_process()
    (view,) = build_recipe(AugmentConfig(recipe="supervised")).views
    recipe, beton = Recipe(views=(view,) * num_views), repeated(open_beton(path))

    def make() -> FFCVLoader:
        return FFCVLoader(
            beton,
            recipe,
            seed=0,
            global_batch_size=BATCH_SIZE,
            num_threads=workers,
            scaled_decode=scaled,
            output="crops",
        )

    batches = epochs_of(make, BATCH_SIZE)

    def run(num_images: int) -> None:
        deque(batches(num_images), maxlen=0)

    return run
