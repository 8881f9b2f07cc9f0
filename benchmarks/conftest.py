"""Options of the benchmarks, the images that they read, and where their rows go."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.contestant import Contestant
from benchmarks.harness import Floor, Row, Unit, race, write_json

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-data", type=Path, metavar="DIR", help="a folder with one folder of images per class")
    group.addoption("--bench-json", type=Path, metavar="FILE", help="where the rows are written")
    group.addoption("--bench-images", type=int, default=334, help="images taken from the folder (default: 334)")
    group.addoption("--bench-workers", type=int, default=4, help="threads or processes of a loader (default: 4)")
    group.addoption("--bench-seconds", type=float, default=0.3, help="length of one turn (default: 0.3)")
    group.addoption("--bench-rounds", type=int, default=5, help="turns of each contestant (default: 5)")
    group.addoption("--bench-large", action="store_true", help="also the works that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(0))  # turns are as long as asked for, and have a limit of their own


class Bench:
    """Runs races under the session's options, prints their tables and keeps their rows."""

    def __init__(self, config: pytest.Config) -> None:
        self.workers: int = config.getoption("--bench-workers")
        self._rounds: int = config.getoption("--bench-rounds")
        self._seconds: float = config.getoption("--bench-seconds")
        self.rows: list[Row] = []

    def race(self, work: str, unit: Unit, contestants: Sequence[Contestant], floors: dict[str, Floor]) -> None:
        """Race, print, keep the rows, and assert the floors of the first contestant."""
        result = race(work, unit, contestants, rounds=self._rounds, seconds=self._seconds)
        self.rows += result.rows()
        ours = contestants[0].name
        print(f"\n{result.table(ours, floors)}")
        result.require(ours, floors)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    """The session's `Bench`; rows are written at the end, also when a floor was missed."""
    bench = Bench(pytestconfig)
    yield bench
    path: Path | None = pytestconfig.getoption("--bench-json")
    if path:
        write_json(path, bench.rows)


@pytest.fixture(scope="session")
def large(pytestconfig: pytest.Config) -> None:
    """Skips what takes minutes, unless it is asked for."""
    if not pytestconfig.getoption("--bench-large"):
        pytest.skip("takes minutes; --bench-large runs it")


@pytest.fixture(scope="session")
def make_beton(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts images of `--bench-data`, or of the archive named that lies in the folder TWINVIEW_DATA."""

    def make(archive: str, num_images: int, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("beton")
        given: Path | None = pytestconfig.getoption("--bench-data")
        if given:
            _link_images(given, folder / "images", num_images)
        elif "TWINVIEW_DATA" in os.environ:
            _unpack_images(Path(os.environ["TWINVIEW_DATA"], archive), folder / "images", num_images)
        else:
            pytest.skip("neither --bench-data nor TWINVIEW_DATA names a folder of images")
        beton = folder / "set.beton"
        # A process of its own: benchmarks know the tools by their commands alone.
        command = [sys.executable, "-m", "tools.convert", str(folder / "images"), str(beton), *options]
        subprocess.run(command, check=True, cwd=ROOT)
        return beton

    return make


def _link_images(source: Path, target: Path, num_images: int) -> None:
    """Link to images of `source`, equally many of each class."""
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    if not classes:
        raise pytest.UsageError(f"--bench-data must hold one folder of images per class, found none in {source}")
    for folder in classes[:num_images]:
        (target / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[: max(num_images // len(classes), 1)]:
            (target / folder.name / path.name).symlink_to(path.resolve())


def _unpack_images(archive: Path, target: Path, num_images: int) -> None:
    """Unpack the first images of an archive, keeping the folders that name their classes."""
    with tarfile.open(archive) as tar:
        images = (member for member in tar if member.name.lower().endswith((".jpg", ".jpeg")))
        for member in islice(images, num_images):
            path = target / Path(member.name).parent.name / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content
            path.write_bytes(content.read())
