"""Options of the benchmarks, the images that they read, and where their rows go."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contestant import Contestant
from benchmarks.environment import command, environment
from benchmarks.harness import Floor, Race, Ratio, Row, Unit, pooled, race
from benchmarks.heats import heats
from benchmarks.image_sets import link_images, make_images, unpack_images
from benchmarks.results import Results, write_results
from pipelines.buffers import free_host_memory

ROOT = Path(__file__).parents[1]
# By contestant, what it imports of requirements-bench.txt.
OPTIONAL_MODULES = {"lightly": "lightly", "metric_learning": "pytorch_metric_learning"}
MARKER = "quick: a benchmark that --bench-quick runs"
MEMORY_SHARE = 0.95  # of what is free; the rest is left to everything else that runs
QUICK_SHARE = 0.6  # of a floor is asserted of a few short rounds, beside whatever else a small machine does


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    workers: int
    """Threads or processes of a loader."""
    rounds: int
    """Turns of each contestant."""
    seconds: float
    """Length of a turn."""
    images: int
    """Of the larger kind, which a benchmark reads."""
    quick: bool = False
    """Few races in short turns, with low floors."""
    large: bool = False
    """Also the works that take minutes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-data", type=Path, metavar="DIR", help="images: class folders, or one flat folder")
    group.addoption("--bench-json", type=Path, metavar="FILE", help="where the results are written")
    group.addoption("--bench-images", type=int, help="images taken from the folder (default: 334; quick: 96)")
    group.addoption("--bench-workers", type=int, help="threads or processes of a loader (default: cores, at most 4)")
    group.addoption("--bench-seconds", type=float, help="length of one turn (default: 0.3; quick: 0.15)")
    group.addoption("--bench-rounds", type=int, help="turns of each contestant (default: 5; quick: 3)")
    group.addoption("--bench-quick", action="store_true", help="the most telling races alone, in short turns")
    group.addoption("--bench-large", action="store_true", help="also the works that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", MARKER)
    images: Path | None = config.getoption("--bench-data")
    if images and not images.is_dir():
        raise pytest.UsageError(f"--bench-data must be a folder of images, found none at {images}")
    result: Path | None = config.getoption("--bench-json")
    if result and (result.is_dir() or not result.absolute().parent.is_dir()):
        raise pytest.UsageError(f"--bench-json must be a file in a folder that exists, got {result}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        item.add_marker(pytest.mark.timeout(0))  # turns are as long as asked for, and have a limit of their own
    if config.getoption("--bench-quick"):
        slow = [item for item in ours if item.get_closest_marker("quick") is None]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def settings(config: pytest.Config) -> Settings:
    """What the options ask for."""
    quick: bool = config.getoption("--bench-quick")
    default = Settings(
        workers=min(len(os.sched_getaffinity(0)), 4),
        rounds=3 if quick else 5,
        seconds=0.15 if quick else 0.3,
        images=96 if quick else 334,
        quick=quick,
        large=config.getoption("--bench-large"),
    )
    asked = {name: config.getoption(f"--bench-{name}") for name in ("workers", "rounds", "seconds", "images")}
    return replace(default, **{name: value for name, value in asked.items() if value is not None})


class Bench:
    """Runs races under the session's settings, prints their tables and keeps what they found."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.workers, self.rounds, self.quick = settings.workers, settings.rounds, settings.quick
        self._load = os.getloadavg()[0]
        self.rows: list[Row] = []
        self.ratios: list[Ratio] = []
        self.images: list[str] = []
        self._figures: dict[str, Mapping[str, Any]] = {}

    def race(
        self,
        work: str,
        unit: Unit,
        contestants: Sequence[Contestant],
        floors: dict[str, Floor],
        *,
        max_rounds: int | None = None,
        one_core: bool = False,
        quick: Collection[str] | None = None,
    ) -> None:
        """Race those whose packages are installed and for whom there is memory, and judge the first contestant.

        Args:
            work: its name.
            unit: of the medians.
            contestants: the first one is ours.
            floors: by contestant, what must hold of ours against it.
            max_rounds: of work so long that a few rounds must do.
            one_core: assert that nobody used more.
            quick: who races beside ours in a quick run; everyone by default.
        """
        if self.quick and quick is not None:
            contestants = [one for one in contestants if one is contestants[0] or one.name in quick]
        present = [contestant for contestant in contestants if is_installed(contestant.name)]
        races, remarks = heats(work, present, MEMORY_SHARE * free_host_memory() / 2**20)
        for remark in remarks:
            print(f"\n{remark}", end="")
        if not races:
            pytest.skip("; ".join(remarks))
        rounds = min(self.rounds, max_rounds or self.rounds)
        results = [race(work, unit, entrants, rounds=rounds, seconds=self.settings.seconds) for entrants in races]
        self._judge(results, floors)
        if one_core:
            pooled(results).require_one_core()

    def judge(self, result: Race, floors: dict[str, Floor]) -> None:
        """Print the table, keep the rows, and assert the floors of the first contestant."""
        self._judge([result], floors)

    def record(self, work: str, figures: Mapping[str, Any]) -> None:
        """Keep what else was found of a work, as JSON can hold it, beside its rows."""
        self._figures[work] = figures

    def results(self) -> Results:
        """Everything so far."""
        return Results(
            rows=self.rows,
            ratios=self.ratios,
            environment=environment() | {"load_before": self._load},
            command=command(),
            settings=asdict(self.settings),
            images=self.images,
            figures=self._figures,
        )

    def _judge(self, results: Sequence[Race], floors: dict[str, Floor]) -> None:
        if self.quick:
            floors = {name: replace(floor, speed=QUICK_SHARE * floor.speed) for name, floor in floors.items()}
        self.rows += pooled(results).rows()
        for result in results:
            first, *others = result.turns
            self.ratios += result.ratios(floors)
            print(f"\n{result.table(first, {name: floors[name] for name in others if name in floors})}")
        for result in results:
            first, *others = result.turns
            result.require(first, {name: floors[name] for name in others if name in floors})

    def scaling(self, work: str, by_workers: dict[int, Contestant], *, max_cost: float) -> None:
        """Race one contestant against itself with one worker and with more.

        Rows are named after the contestant, their works after the number of workers. Efficiency is printed and not
        asserted, since it falls with whatever else the machine does; what is asserted is that an image costs no more
        than `max_cost` times the CPU seconds that it costs one worker.
        """
        names = {n: f"{work}_workers{n}" for n in by_workers}
        entrants = [replace(contestant, name=names[n]) for n, contestant in by_workers.items()]
        result = race(work, "images/s", entrants, rounds=self.rounds, seconds=self.settings.seconds)
        rows = dict(zip(by_workers, result.rows(), strict=True))
        self.rows += [replace(row, work=names[n], contestant=by_workers[n].name) for n, row in rows.items()]
        print(f"\n{result.table(names[max(names)], {})}")
        self.ratios += [
            replace(result.against(name, names[1]), work=name, first=by_workers[n].name, second="one_worker")
            for n, name in names.items()
            if n > 1
        ]
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
    """The session's `Bench`; its results are written at the end, also when a floor was missed."""
    bench = Bench(settings(pytestconfig))
    yield bench
    path: Path | None = pytestconfig.getoption("--bench-json")
    if path:
        write_results(path, bench.results())


@pytest.fixture(scope="session")
def large(bench: Bench) -> None:
    """Skips what takes minutes, unless it is asked for."""
    if not bench.settings.large:
        pytest.skip("takes minutes; --bench-large runs it")


@pytest.fixture(scope="session")
def make_beton(
    bench: Bench, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Converts images of `--bench-data`, else of the archive in the folder TWINVIEW_DATA, else made here; once."""

    @cache
    def make(archive: str, num_images: int, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("beton")
        given: Path | None = pytestconfig.getoption("--bench-data")
        if given:
            link_images(given, folder / "images", num_images)
            source = f"{num_images} of --bench-data"
        elif "TWINVIEW_DATA" in os.environ:
            unpack_images(Path(os.environ["TWINVIEW_DATA"], archive), folder / "images", num_images)
            source = f"{num_images} of {archive}"
        else:
            make_images(archive, folder / "images", num_images)
            source = f"{num_images} windows of scikit-learn's two photographs in place of {archive}"
        print(f"\nimages: {source}")
        bench.images.append(source)
        beton = folder / "set.beton"
        # A process of its own: benchmarks know the tools by their commands alone.
        convert = [sys.executable, "-m", "tools.convert", str(folder / "images"), str(beton), *options]
        subprocess.run(convert, check=True, cwd=ROOT)
        return beton

    return make
