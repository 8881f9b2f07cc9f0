"""The harness measures what it says: speed, CPU time, memory; and a contestant that fails is named."""

import ast
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.conftest import OPTIONAL_MODULES, QUICK_SHARE, Bench, Settings, is_installed, pytest_configure
from benchmarks.contestant import Contestant, ContestantFailed, Turn, WarmUp
from benchmarks.environment import command, driver_version, environment
from benchmarks.harness import Floor, Race, pooled, race
from benchmarks.image_sets import link_images, make_images
from benchmarks.results import read_results, write_results
from benchmarks.startup import startup_race
from tests.benchmarks import contestants
from tests.pipelines.betons import natural_image

ROOT = Path(__file__).parents[2]
ROW_KEYS = ["work", "contestant", "median", "unit", "spread", "cpu_s_per_item", "peak_mib", "repeats", "gpu_peak_mib"]


def run_race(*setups, seconds=0.05, rounds=3):
    entrants = [
        Contestant(name=name, setup=setup, arguments=arguments, step=step) for name, setup, arguments, step in setups
    ]
    return race("work", "images/s", entrants, rounds=rounds, seconds=seconds)


def by_name(result):
    return {row.contestant: row for row in result.rows()}


def test_speeds_costs_and_memory_are_those_of_the_work():
    result = run_race(
        ("fast", contestants.sleeper, (0.001,), 10),
        ("slow", contestants.sleeper, (0.005,), 10),
        ("spinner", contestants.spinner, (0.005,), 1),
        ("worker", contestants.spinner_in_a_worker, (0.005,), 1),
        ("hoarder", contestants.hoarder, (80,), 1),
        ("autograd", contestants.saves_for_backward, (40,), 1),
        seconds=0.1,
    )
    rows = by_name(result)
    # Bounds that hold on a busy machine too: a sleep is never shorter than asked for, CPU seconds are not wall time.
    assert result.ratio("fast", "slow") > 1
    assert rows["fast"].median <= 1000
    assert rows["slow"].median <= 200
    assert rows["slow"].cpu_s_per_item < 0.003
    assert 0.0049 < rows["spinner"].cpu_s_per_item < 0.02
    assert 0.003 < rows["worker"].cpu_s_per_item < 0.02  # counted in hundredths of a second
    assert 79 < rows["hoarder"].peak_mib < 85
    assert 79 < rows["autograd"].peak_mib < 85
    assert rows["slow"].peak_mib < 5
    assert all(len(turns) == 3 for turns in result.turns.values())
    assert all(turn.items % 10 == 0 for turn in result.turns["fast"])


def test_medians_spread_and_ratios_by_hand():
    def turns(*seconds):
        return [Turn(items=12, seconds=s, cpu_seconds=2 * s) for s in seconds]

    warm_ups = {name: WarmUp(peak_mib=peak, items_per_turn=12) for name, peak in (("ours", 2.0), ("theirs", 30.0))}
    all_turns = {"ours": turns(1, 2, 3, 4, 6), "theirs": turns(4, 4, 4, 12, 12)}
    images = Race(work="w", unit="images/s", warm_ups=warm_ups, turns=all_turns)
    seconds = Race(work="w", unit="s", warm_ups=warm_ups, turns=all_turns)
    # 12, 6, 4, 3, 2 images a second: quartiles 3 and 6; a third to a twelfth of a second for an item.
    ours = by_name(images)["ours"]
    assert (ours.median, ours.spread, ours.cpu_s_per_item) == (4.0, 0.75, 0.5)
    assert (ours.peak_mib, ours.repeats, ours.unit) == (2.0, 5, "images/s")
    assert by_name(seconds)["ours"].median == 0.25
    # Round by round: 4, 2, 4/3, 3, 2.
    assert images.ratio("ours", "theirs") == pytest.approx(2.0)
    assert seconds.ratio("theirs", "ours") == pytest.approx(0.5)
    floor = Floor(speed=1.9, goal=9, memory=0.07)
    (ratio,) = images.ratios({"theirs": floor})
    # Of 4/3, 2, 2, 3, 4 the quartiles are 2 and 3.
    assert (ratio.work, ratio.first, ratio.second, ratio.rounds) == ("w", "ours", "theirs", 5)
    assert (ratio.ratio, ratio.spread, ratio.memory) == (pytest.approx(2.0), pytest.approx(0.5), pytest.approx(1 / 15))
    assert (ratio.floor, ratio.goal, ratio.memory_limit) == (1.9, 9, 0.07)
    assert images.against("theirs", "ours").ratio == pytest.approx(0.5)
    assert images.against("theirs", "ours").goal is None
    images.require("ours", {"theirs": floor})
    with pytest.raises(AssertionError, match=re.escape("w: ours is 2.00 times as fast as theirs, floor 2.1")):
        images.require("ours", {"theirs": Floor(speed=2.1, goal=9)})
    with pytest.raises(AssertionError, match=re.escape("ours is at 0.067 of the memory of theirs, at most 0.05")):
        images.require("ours", {"theirs": Floor(speed=1.9, goal=9, memory=0.05)})
    table = images.table("ours", {"theirs": Floor(speed=1.9, goal=9)}).splitlines()
    assert len({len(line.split("  ours is")[0].split("2.00×")[0].rstrip()) for line in table}) == 1
    assert table[2].endswith("2.00× (floor 1.9, goal 9)")


def test_races_of_pairs_give_one_row_a_contestant():
    def pair(name, ours, theirs, peak):
        warm_ups = {"ours": WarmUp(peak_mib=peak, items_per_turn=1), name: WarmUp(peak_mib=9.0, items_per_turn=1)}
        turns = {"ours": turns_of(ours), name: turns_of(theirs)}
        return Race(work="w", unit="s", warm_ups=warm_ups, turns=turns)

    def turns_of(seconds):
        return [Turn(items=1, seconds=s, cpu_seconds=s) for s in seconds]

    rows = by_name(pooled([pair("a", [1, 2, 3], [4, 4, 5], 1.0), pair("b", [7, 8], [6, 6], 3.0)]))
    assert list(rows) == ["ours", "a", "b"]
    assert (rows["ours"].median, rows["ours"].repeats, rows["ours"].peak_mib) == (3, 5, 3.0)
    assert (rows["a"].median, rows["a"].repeats, rows["b"].median) == (4, 3, 6)


def test_more_than_one_core_is_noticed():
    def one(cpu_seconds):
        turns = {"ours": [Turn(items=4, seconds=8.0, cpu_seconds=cpu_seconds)]}
        return Race(work="w", unit="s", warm_ups={"ours": WarmUp(peak_mib=0.0, items_per_turn=4)}, turns=turns)

    one(8.1).require_one_core()
    with pytest.raises(AssertionError, match="w: ours used more than one core"):
        one(9.0).require_one_core()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (contestants.fails_in_setup, "broken failed:\n.*ValueError: no such image set"),
        (contestants.fails_in_its_turn, "broken failed:\n.*ValueError: 1 items are too many"),
        (contestants.dies, "broken ended with exit code 7"),
    ],
)
def test_a_contestant_that_fails_is_named(setup, message):
    with pytest.raises(ContestantFailed, match=re.compile(message, re.DOTALL)):
        run_race(("fine", contestants.sleeper, (0.001,), 1), ("broken", setup, (), 1))


def test_start_ups_are_timed_to_the_line_that_says_so():
    def sleeps(seconds):
        return ["-c", f"import time; time.sleep({seconds}); print({seconds + 3}, flush=True); time.sleep(0.2)"]

    result = startup_race("startup", {"fast": sleeps(0), "slow": sleeps(0.5)}, rounds=2)
    row = by_name(result)["slow"]
    assert by_name(result)["fast"].median > 0
    assert row.median > 0.5
    assert row.cpu_s_per_item > 0.003
    assert (row.peak_mib, row.unit, row.repeats) == (3.5, "s", 2)
    with pytest.raises(ContestantFailed, match="broken ended with exit code 3 before its first batch"):
        startup_race("startup", {"broken": ["-c", "raise SystemExit(3)"]}, rounds=1)


def test_any_folder_of_images_gives_rows_for_machines(tmp_path):
    (tmp_path / "images").mkdir()
    for i, name in enumerate(["a.png", "b.jpg", "c.webp", "d.gif", "e.bmp", "f.tif"]):
        natural_image(60 + i, 50, i).save(tmp_path / "images" / name)
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "scaling and crop224", "-p", "no:cacheprovider"]
    options = ["--bench-data", str(tmp_path / "images"), "--bench-json", str(tmp_path / "rows.json")]
    short = ["--bench-workers", "1", "--bench-rounds", "2", "--bench-seconds", "0.01"]
    result = subprocess.run([*command, *options, *short], check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    (row,) = written["rows"]
    assert list(row) == ROW_KEYS
    assert written["command"].endswith(shlex.join([*command[1:], *options, *short]))
    assert written["settings"]["rounds"] == 2
    assert written["images"] == ["334 of --bench-data"]
    assert (row["work"], row["contestant"]) == ("crop224_workers1", "twinview")
    assert (row["unit"], row["repeats"]) == ("images/s", 2)
    assert row["median"] > 0


def test_images_are_taken_equally_from_all_classes(tmp_path):
    source = tmp_path / "images"
    for name in ["b/2.png", "b/1.jpg", "b/.hidden", "a/deep/er/x", "a/deep/y", "a/z.JPEG", ".git/config"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    link_images(source, tmp_path / "links", 4)
    links = [path for path in (tmp_path / "links").rglob("*") if path.is_symlink()]
    names = {path.relative_to(tmp_path / "links").as_posix() for path in links}
    assert names == {"a/z.JPEG", "a/deep/y", "b/1.jpg", "b/2.png"}
    assert all(path.read_text() == path.relative_to(tmp_path / "links").as_posix() for path in links)
    link_images(source / "b", tmp_path / "flat", 1)
    assert [path.name for path in (tmp_path / "flat").iterdir()] == ["1.jpg"]


def test_what_a_contestant_lacks_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(OPTIONAL_MODULES, "lightly", "no_such_module")
    assert is_installed("twinview")
    assert not is_installed("lightly")
    expected = "lightly takes no part: no_such_module is missing; run `uv pip install -r requirements-bench.txt`"
    assert capsys.readouterr().out.split("\n") == ["", expected, ""]


def judged(quick, ours=1.0, theirs=2.0):
    """A session in which ours took so many seconds, and its floor of 3 was missed or not."""
    bench = Bench(Settings(workers=1, rounds=1, seconds=0.1, images=1, quick=quick))
    turns = {name: [Turn(items=1, seconds=s, cpu_seconds=s)] for name, s in (("ours", ours), ("theirs", theirs))}
    warm_ups = {name: WarmUp(peak_mib=0.5, items_per_turn=1) for name in turns}
    bench.record("w", {"accuracy": 0.9})
    with contextlib.suppress(AssertionError):
        bench.judge(Race(work="w", unit="s", warm_ups=warm_ups, turns=turns), {"theirs": Floor(speed=3, goal=4)})
        bench.record("w", {"passed": True})
    return bench.results()


def test_what_was_found_is_kept_also_when_a_floor_is_missed(tmp_path):
    results = judged(quick=False)
    assert results.figures == {"w": {"accuracy": 0.9}}
    assert [row.contestant for row in results.rows] == ["ours", "theirs"]
    (ratio,) = results.ratios
    assert (ratio.ratio, ratio.floor, ratio.goal, ratio.memory) == (2.0, 3, 4, None)
    write_results(tmp_path / "rows.json", results)
    assert read_results(tmp_path / "rows.json") == results


def test_a_quick_run_asserts_a_share_of_the_floors():
    assert QUICK_SHARE * 3 < 2
    results = judged(quick=True)
    assert results.figures == {"w": {"passed": True}}
    assert results.ratios[0].floor == pytest.approx(QUICK_SHARE * 3)
    assert judged(quick=True, theirs=1.0).figures == {"w": {"accuracy": 0.9}}


def test_the_environment_tells_device_versions_and_commit():
    about = environment()
    assert about["cores"] == len(os.sched_getaffinity(0))
    assert about["torch"] == torch.__version__.partition("+")[0]
    assert about["device"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", about["commit"])
    assert ("gpus" in about) == ("driver" in about) == torch.cuda.is_available()
    json.dumps(about)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12.2.0 ",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (x)\n", "570.124.06"),
        ("", "unknown"),
    ],
)
def test_the_driver_is_read_from_what_it_tells(text, version):
    assert driver_version(text) == version


def test_the_command_can_be_typed_again(monkeypatch):
    python = f"{ROOT}/.venv/bin/python"
    monkeypatch.setattr(sys, "orig_argv", [python, "-m", "pytest", f"{ROOT}/benchmarks", "-k", "a b"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 0})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for name in ("GOMP_SPINCOUNT", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TWINVIEW_DATA", "/home/me/data")
    told = "taskset --cpu-list 0,1 python -m pytest benchmarks -k 'a b'"
    assert command() == f'OMP_NUM_THREADS=1 TWINVIEW_DATA="$TWINVIEW_DATA" {told}'


def test_images_are_made_where_none_are_given(tmp_path):
    for archive, size in (("imagenet-sample.tar", (500, 375)), ("cifar10.tar.xz", (32, 32))):
        for again in ("a", "b"):
            make_images(archive, tmp_path / again / archive, 6)
        paths = sorted((tmp_path / "a" / archive).rglob("*.jpg"))
        assert len(paths) == 6
        assert len({path.parent.name for path in paths}) == 2
        assert len({path.read_bytes() for path in paths}) == 6
        for path in paths:
            with Image.open(path) as image:
                assert image.size == size
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_peers_are_installed_from_the_requirements():
    """Whatever a peer imports is ours, torch's, or named for the benchmarks or for users."""
    files = ("requirements-bench.txt", "requirements.txt")
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    named = {re.match(r"[\w-]+", line)[0].lower() for line in lines if re.match(r"\w", line)}
    modules = set()
    for path in (ROOT / "benchmarks" / "peers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - {"benchmarks", "pipelines", "model", "train", "native"}
    assert foreign >= {"lightly", "ffcv", "nvidia", "torchvision"}
    assert {module for module in foreign if not named & {name.lower() for name in distributions[module]}} == set()
    assert set(OPTIONAL_MODULES.values()) <= foreign


class Collected:
    """The tests that a session would run."""

    def pytest_collection_finish(self, session):
        self.names = {item.name.removeprefix("test_") for item in session.items}


def collected(*options):
    session = Collected()
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    assert pytest.main([str(ROOT / "benchmarks"), *arguments], plugins=[session]) == 0
    return session.names


def test_every_benchmark_is_found_and_a_quick_run_takes_the_most_telling_ones(tmp_path):
    everything = collected("--bench-data", str(tmp_path), "--bench-json", str(tmp_path / "rows.json"))
    quick = collected("--bench-quick")
    telling = {"crop224", "simclr224", "simclr32", "ntxent[1024]", "resnet50", "rows[1]"}
    assert telling <= quick < everything
    slow = {"startup", "scaling[crop224]", "ntxent[4096]", "ntxent_large[8192-None]", "checkpoint", "scaled"}
    assert slow <= everything - quick


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--bench-data", "absent", "--bench-data must be a folder of images, found none at absent"),
        ("--bench-json", "absent/rows.json", "--bench-json must be a file in a folder that exists, got absent/rows"),
        ("--bench-json", "benchmarks", "--bench-json must be a file in a folder that exists, got benchmarks"),
    ],
)
def test_paths_are_refused_before_anything_is_measured(option, value, complaint):
    config = SimpleNamespace(
        addinivalue_line=lambda *line: None,
        getoption=lambda name: Path(value) if name == option else None,
    )
    with pytest.raises(pytest.UsageError, match=re.escape(complaint)):
        pytest_configure(config)
