"""How a run scales over ranks on this machine, and how well `tools.plan` predicts it.

One core a rank, for its loader and its computing, so that more ranks have more cores and nobody is helped otherwise.
Strong scaling shares one batch out; weak scaling gives every rank as many images. Efficiency is images a second over n
times those of one rank, of the same rounds.

The prediction starts from what `tools.profile_throughput` measures on one and on two ranks; `tools.plan` makes of it
images a second on four, which are then compared with those measured. Both are processes of their own. Where a machine
has other work, ranks wait for the slowest of them, which neither efficiency nor prediction can help: floors are wide,
and hold on a machine without other work alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import ROOT, Bench
from benchmarks.contestant import Contestant
from benchmarks.harness import Floor, Race, race
from benchmarks.scaling_ranks import RECIPE, cores, training_ranks

NUM_IMAGES = 10_000
BATCH = 256
RANKS = (1, 2, 4)
PROFILED = (1, 2)  # ranks that are profiled; the others are predicted
FLOOR = Floor(speed=0.6, goal=3.0)  # of the most ranks against one; small networks gain nothing on four cores
MAX_FACTOR = 2.0  # between predicted and measured
BUSY = 0.5  # of the cores, by the load average: more of other work, and nothing is judged


def ranks_of(bench: Bench) -> list[int]:
    """As many as there are cores for; few, unless all works are asked for."""
    most = len(cores()) if bench.settings.large else 2
    return [number for number in RANKS if number <= min(most, len(cores()))]


def name_of(ranks: int) -> str:
    return f"{ranks}_rank{'s' * (ranks > 1)}"


def race_of_ranks(bench: Bench, work: str, beton: Path, batches: dict[int, int]) -> Race:
    """Race numbers of ranks, each with a global batch, against one another; prints and keeps efficiencies."""
    contestants = [
        Contestant(
            name=name_of(ranks),
            setup=training_ranks,
            arguments=(ranks, arguments_of(beton, batch)),
            step=batch,
        )
        for ranks, batch in sorted(batches.items(), reverse=True)
    ]
    result = race(work, "images/s", contestants, rounds=bench.rounds, seconds=bench.settings.seconds)
    efficiency = {ranks: result.ratio(name_of(ranks), name_of(1)) / ranks for ranks in batches}
    print(
        f"\n{work}: efficiency " + ", ".join(f"{share:.0%} on {ranks}" for ranks, share in efficiency.items()), end=""
    )
    bench.record(work, {"efficiency": {str(ranks): share for ranks, share in efficiency.items()}, "batch": batches})
    bench.judge(result, {} if is_busy() else {name_of(1): FLOOR})
    return result


@lru_cache(maxsize=1)
def is_busy() -> bool:
    """Whether the machine had other work before the first race; says so."""
    load = os.getloadavg()[0]
    busy = load > BUSY * len(cores())
    if busy:
        print(
            f"\nload {load:.1f} on {len(cores())} cores: ranks wait for each other's turns, nothing is judged", end=""
        )
    return busy


def arguments_of(beton: Path, batch: int) -> tuple[str, ...]:
    """Of a run that lasts as long as it is asked to."""
    return (*words_of(beton, batch), "--name=scaling", f"--runs_dir={os.devnull}", "--train.epochs=1000")


def words_of(beton: Path, batch: int) -> tuple[str, ...]:
    return (f"--data.path={beton}", *RECIPE, f"--data.global_batch_size={batch}")


@pytest.fixture(scope="module")
def beton(make_beton: Callable[..., Path]) -> Path:
    is_busy()
    if len(cores()) < RANKS[1]:
        pytest.skip("needs two cores")
    return make_beton("cifar10.tar.xz", NUM_IMAGES, "--encode", "raw", "--max-side", "32")


def test_strong_scaling_and_prediction(bench: Bench, beton: Path, tmp_path: Path) -> None:
    """The same batch on 1, 2, 4 ranks; with `--bench-large` also what `tools.plan` said before."""
    ranks = ranks_of(bench)
    rows = predicted(beton, tmp_path, ranks) if bench.settings.large else {}
    result = race_of_ranks(bench, "scaling_strong", beton, dict.fromkeys(ranks, BATCH))
    if rows:
        compare(bench, result, rows)


def test_weak_scaling(bench: Bench, beton: Path, large: None) -> None:
    """As many images on every rank."""
    race_of_ranks(bench, "scaling_weak", beton, {number: BATCH // 2 * number for number in ranks_of(bench)})


def predicted(beton: Path, folder: Path, ranks: list[int]) -> dict[int, dict[str, Any]]:
    """The plan's rows by number of ranks, from profiles of few."""
    files = [profile(beton, folder, number) for number in PROFILED]
    plan = folder / "plan.json"
    numbers = ",".join(map(str, ranks))
    command = ["tools.plan", "--profile", *files, "--gpus", numbers, "--json", plan]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, cwd=ROOT)
    return {row["gpus"]: row for row in json.loads(plan.read_text())["rows"]}


def profile(beton: Path, folder: Path, ranks: int) -> Path:
    """Measured by the tool under the launcher, with as many cores as ranks."""
    file, ours = folder / f"profile{ranks}.json", cores()
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    tool = ["tools.profile_throughput", *words_of(beton, BATCH), "--no-verify", "--seconds", "1", "--json", str(file)]
    os.sched_setaffinity(0, ours[:ranks])  # what children inherit
    try:
        subprocess.run([sys.executable, "-m", *launcher, *tool], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    finally:
        os.sched_setaffinity(0, ours)
    return file


def compare(bench: Bench, result: Race, rows: dict[int, dict[str, Any]]) -> None:
    """Print, keep and judge what was predicted against what was measured."""
    measured = {row.contestant: row.median for row in result.rows()}
    found = {}
    for ranks, row in sorted(rows.items()):
        rate, said = measured[name_of(ranks)], row["images_per_sec"]
        kind = "profiled" if ranks in PROFILED else "predicted"
        print(f"{ranks} ranks: {kind} {said:.0f} images/s, measured {rate:.0f}: {said / rate - 1:+.0%}")
        found[str(ranks)] = {"kind": kind, "predicted": said, "measured": rate, "error": said / rate - 1}
    relative = {ranks: row["predicted"] / found["1"]["predicted"] for ranks, row in found.items()}
    actual = {ranks: row["measured"] / found["1"]["measured"] for ranks, row in found.items()}
    print("speed-up over one rank: " + ", ".join(f"{relative[n]:.2f} for {actual[n]:.2f} on {n}" for n in relative))
    bench.record("scaling_prediction", {"ranks": found, "predicted_speedup": relative, "measured_speedup": actual})
    for number, figures in () if is_busy() else found.items():
        factor = max(figures["predicted"] / figures["measured"], figures["measured"] / figures["predicted"])
        assert factor <= MAX_FACTOR, f"{number} ranks: predicted {factor:.1f} times too much or too little"
