"""The command: its words, its files, and the whole of it as a process, on one rank and on two."""

import json
import statistics
from pathlib import Path

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Forked, run_script, variables_of
from tests.train.runs import TINY
from tools.profile_command import parse_arguments, write_json
from tools.profile_results import STAGES, Profile
from train.runtime import free_port

RUN = ["--data.path=set.beton", "--name=photos"]
STEP = {"load", "forward", "loss", "backward", "optimizer", "step"}


def start(folder, *words, rank=0, world_size=1, port=None):
    script = ["tools/profile_throughput.py", *map(str, words)]
    variables = variables_of(rank, world_size, port or free_port()) | {"KINETO_LOG_LEVEL": "6"}
    return Forked(folder / f"output-{rank}", variables, run_script, script)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Room for one batch of 16 and none of 32."""
    return make_beton(tmp_path_factory.mktemp("set"), [(60 + i, 50) for i in range(24)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, beton):
    """What the command wrote, asked for everything; and what it said."""
    folder = tmp_path_factory.mktemp("found")
    files = ["--json", folder / "found.json", "--figure", folder / "found.svg", "--trace", folder / "trace.json"]
    process = start(folder, "--data", beton.path, *TINY, *files, "--sweep", "--seconds", "0.05", "--data.num_threads=1")
    assert process.end() == 0, process.text()
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


# The words


def test_our_options_and_those_of_a_run_are_told_apart():
    asked, config = parse_arguments(
        ["--json", "found.json", *RUN, "--seconds=0.5", "--train.epochs", "7", "--no-verify"]
    )
    assert (asked.json, asked.seconds, asked.verify, asked.sweep) == (Path("found.json"), 0.5, False, False)
    assert (config.name, config.train.epochs, config.data.path) == ("photos", 7, "set.beton")


def test_data_is_short_for_its_path_and_a_run_needs_no_name(tmp_path):
    (tmp_path / "run.yaml").write_text("name: of-the-file\ndata: {path: other.beton}\n")
    _, config = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--data", "mine.beton"])
    assert (config.data.path, config.name) == ("mine.beton", "of-the-file")
    assert parse_arguments(["--data=mine.beton", "--local_rank=1"])[1].data.path == "mine.beton"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--figure", "found.jpg"], r"`--figure` must be named \*.png or \*.svg, got found.jpg"),
        (["--json", "nowhere/found.json"], r"`--json` must lie in a folder that exists, .*; make nowhere"),
        (["--trace", "."], r"`--trace` must name a file, got the folder \."),
        (["--seconds", "0"], r"`--seconds` must be above 0 and at most 3600, got 0.0"),
        (["--seconds", "soon"], "--seconds: invalid float value: 'soon'"),
        (["--json"], "--json: expected one argument"),
        (["--json", "a.png", "--figure", "a.png"], "must name different files"),
        (["--train.epoch", "3"], "there is no option `train.epoch`; did you mean `train.epochs`"),
        (["--data.num_threads", "many"], "`data.num_threads` must be of type int, got many"),
    ],
)
def test_bad_input_is_named_in_a_line(words, line):
    with pytest.raises(ValueError, match=line) as caught:
        parse_arguments([*RUN, *words])
    assert "\n" not in str(caught.value)


def test_help_names_our_options_and_those_of_a_run(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    printed = capsys.readouterr().out
    for word in ("--sweep", "--no-verify", "--train.cpu_threads", "--data.loader"):
        assert word in printed


def test_json_that_cannot_be_whole_is_not_there(tmp_path):
    (tmp_path / "found.json").write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"rate": float("nan")}, tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


# The whole of it


def test_the_json_holds_what_was_agreed(found):
    profile = Profile.from_json(found["profile"])
    assert found["limiter"] in profile.stages
    assert set(profile.stages) == set(STAGES) - {"host_to_device", "communication"}
    assert found["stages_images_per_sec"] == {name: stage.images_per_sec for name, stage in profile.stages.items()}
    assert found["headroom"].keys() == profile.stages.keys()
    for name in ("loading_images_per_sec", "training_images_per_sec", "together_images_per_sec"):
        assert found[name] == getattr(profile, name) > 0
    assert profile.num_threads == 1
    for advice in found["advice"]:
        assert advice["expected_images_per_sec"] >= 1.03 * found["sustained_images_per_sec"]


def test_the_advice_was_tried_and_the_verdict_follows_from_what_was_measured(found):
    verified = found["verified"]
    possible = [advice["change"] for advice in found["advice"] if advice["kind"] != "machine"]
    assert [trial["change"] for trial in verified["trials"]] == possible[: len(verified["trials"])]
    assert bool(verified["trials"]) == bool(possible)  # fewer than three where one helps, or where time is up
    for trial in verified["trials"]:
        ratios = trial["ratios"]
        assert 3 <= len(ratios) <= 5
        assert trial["ratio"] == statistics.median(ratios)
        assert trial["kept"] == (trial["ratio"] >= 1.02 and sum(ratio > 1.0 for ratio in ratios) >= len(ratios) - 1)
    if possible:
        assert {name: verified[name] for name in ("change", "before", "after", "ratio", "kept")}.items() <= next(
            trial for trial in verified["trials"] if trial["change"] == verified["change"]
        ).items()


def test_the_sweep_names_what_cannot_be_and_marks_the_best(found, folder):
    cells = found["sweep"]["cells"]
    assert cells[0]["is_now"]
    assert (cells[0]["loader"], cells[0]["num_threads"], cells[0]["global_batch_size"]) == ("ffcv", 1, 16)
    for cell in cells:
        assert (cell["images_per_sec"] is None) == (cell["reason"] is not None)
    too_large = [cell["reason"] for cell in cells if cell["global_batch_size"] == 32]
    assert all("must not exceed the 24 images" in reason or "time was over" in reason for reason in too_large)
    rates = [cell["images_per_sec"] for cell in cells if cell["images_per_sec"] is not None]
    assert found["sweep"]["best"]["images_per_sec"] == max(rates)
    assert (folder / "output-0").read_text().count("◀ best") == 1


def test_the_trace_shows_the_stretches_of_each_step(folder):
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    steps = sorted((event for event in named if event["name"] == "step"), key=lambda event: event["ts"])
    assert len(steps) == 4
    for step in steps:
        within = {e["name"] for e in named if step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"]}
        assert within >= STEP


def test_the_figure_and_the_table_name_the_limiter(folder, found):
    text = (folder / "output-0").read_text()
    assert f"limiter: {found['limiter']}." in text
    assert text.count("◀ limits") == 1
    assert "verdict: " in text
    assert "<svg" in (folder / "found.svg").read_text()


def test_nothing_else_is_written(folder, beton):
    assert {path.name for path in folder.iterdir()} == {"found.json", "found.svg", "trace.json", "output-0"}
    assert {path.name for path in beton.path.parent.iterdir()} == {"images", "set.beton", "set.beton.json"}


@pytest.mark.distributed
def test_two_ranks_find_one_answer(beton, tmp_path):
    port = free_port()
    words = [
        "--data",
        beton.path,
        *TINY,
        "--seconds",
        "0.05",
        "--json",
        tmp_path / "found.json",
        "--data.num_threads=1",
    ]
    ranks = [start(tmp_path, *words, rank=rank, world_size=2, port=port) for rank in range(2)]
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["profile"]["world_size"] == 2
    assert found["stages_images_per_sec"]["communication"] > 0
    assert "limiter" in ranks[0].text()
    assert "limiter" not in ranks[1].text()


def test_a_file_that_is_not_there_is_named_in_a_line(tmp_path):
    process = start(tmp_path, "--data", tmp_path / "none.beton", *TINY, "--json", tmp_path / "found.json")
    assert process.end() == 2
    assert len(process.errors()) == 1
    assert "none.beton" in process.errors()[0]
    assert "Traceback" not in process.text()
    assert not (tmp_path / "found.json").exists()
