"""Options of the benchmarks, the images that they read, and where their rows go."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.contestant import Contestant
from benchmarks.harness import Floor, Race, Row, Unit, pooled, race, write_json
from benchmarks.heats import heats
from pipelines.buffers import free_host_memory

ROOT = Path(__file__).parents[1]
# By contestant, what it imports of requirements-bench.txt.
OPTIONAL_MODULES = {"lightly": "lightly", "metric_learning": "pytorch_metric_learning"}
MEMORY_SHARE = 0.95  # of what is free; the rest is left to everything else that runs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-data", type=Path, metavar="DIR", help="images: class folders, or one flat folder")
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
        self.rounds: int = config.getoption("--bench-rounds")
        self._seconds: float = config.getoption("--bench-seconds")
        self.rows: list[Row] = []

    def race(
        self,
        work: str,
        unit: Unit,
        contestants: Sequence[Contestant],
        floors: dict[str, Floor],
        *,
        max_rounds: int | None = None,
        one_core: bool = False,
    ) -> None:
        """Race those whose packages are installed and for whom there is memory, and judge the first contestant.

        Args:
            work: its name.
            unit: of the medians.
            contestants: the first one is ours.
            floors: by contestant, what must hold of ours against it.
            max_rounds: of work so long that a few rounds must do.
            one_core: assert that nobody used more.
        """
        present = [contestant for contestant in contestants if is_installed(contestant.name)]
        races, remarks = heats(work, present, MEMORY_SHARE * free_host_memory() / 2**20)
        for remark in remarks:
            print(f"\n{remark}", end="")
        if not races:
            pytest.skip("; ".join(remarks))
        rounds = min(self.rounds, max_rounds or self.rounds)
        results = [race(work, unit, entrants, rounds=rounds, seconds=self._seconds) for entrants in races]
        self._judge(results, floors)
        if one_core:
            pooled(results).require_one_core()

    def judge(self, result: Race, floors: dict[str, Floor]) -> None:
        """Print the table, keep the rows, and assert the floors of the first contestant."""
        self._judge([result], floors)

    def _judge(self, results: Sequence[Race], floors: dict[str, Floor]) -> None:
        self.rows += pooled(results).rows()
        verdicts = []
        for result in results:
            first, *others = result.turns
            verdicts.append((result, first, {name: floors[name] for name in others if name in floors}))
        for result, first, known in verdicts:
            print(f"\n{result.table(first, known)}")
        for result, first, known in verdicts:
            result.require(first, known)

    def scaling(self, work: str, by_workers: dict[int, Contestant], *, max_cost: float) -> None:
        """Race one contestant against itself with one worker and with more.

        Rows are named after the contestant, their works after the number of workers. Efficiency is printed and not
        asserted, since it falls with whatever else the machine does; what is asserted is that an image costs no more
        than `max_cost` times the CPU seconds that it costs one worker.
        """
        names = {n: f"{work}_workers{n}" for n in by_workers}
        entrants = [replace(contestant, name=names[n]) for n, contestant in by_workers.items()]
        result = race(work, "images/s", entrants, rounds=self.rounds, seconds=self._seconds)
        rows = dict(zip(by_workers, result.rows(), strict=True))
        self.rows += [replace(row, work=names[n], contestant=by_workers[n].name) for n, row in rows.items()]
        print(f"\n{result.table(names[max(names)], {})}")
        efficiency = {n: result.ratio(name, names[1]) / n for n, name in names.items()}
        print("efficiency  " + ", ".join(f"{n} workers: {share:.0%}" for n, share in efficiency.items()))
        cost = rows[max(rows)].cpu_s_per_item / rows[1].cpu_s_per_item
        assert cost <= max_cost, f"{work}: an image costs {max(rows)} workers {cost:.2f} times as much CPU as one"


def is_installed(contestant: str) -> bool:
    """Whether a contestant can take part; prints what is missing."""
    module = OPTIONAL_MODULES.get(contestant)
    if module is None or importlib.util.find_spec(module):
        return True
    print(f"\n{contestant} takes no part: {module} is missing; run `uv pip install -r requirements-bench.txt`")
    return False


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
            link_images(given, folder / "images", num_images)
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


def link_images(source: Path, target: Path, num_images: int) -> None:
    """Link to images of `source`: equally many below each class folder, or the first ones of a flat folder."""
    if not source.is_dir():
        raise pytest.UsageError(f"--bench-data must be a folder of images, found none at {source}")
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    folders = folders[:num_images] or [source]
    for folder in folders:
        for path in islice(_files_below(folder), max(num_images // len(folders), 1)):
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def _files_below(folder: Path) -> Iterator[Path]:
    """Whatever the format: the converter says which files are no images."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


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
