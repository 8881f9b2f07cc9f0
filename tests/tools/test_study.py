"""A study from its command to its table: real runs, what fails, what is not run again, what does not fit."""

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Forked, context, run_script
from tests.tools.study_records import write_record
from tests.train.runs import TINY
from tools import study_runs
from tools.study import study
from tools.study_catalogue import CATALOGUE
from tools.study_config import parse_study
from tools.study_grid import build_grid
from tools.study_records import claim_study_dir, keep, read_json, trials_of, write_json
from tools.study_runs import Children, HowToRun, launch, measurement, run_trials
from train.cli import EXIT_RESUMABLE, RunFailed, RunInterrupted


def run_module(words):
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


class ForkedChildren(Children):
    """The same commands, in processes that need not load torch and DeepSpeed anew."""

    def __init__(self):
        super().__init__()
        context()  # from this thread, which has all cores: what it starts inherits them
        self.commands = []

    def call(self, command, log):
        assert command[0] == sys.executable
        self.commands.append(list(command))
        output = log.with_suffix(".part")
        work = run_module if command[1] == "-m" else run_script
        child = Forked(output, {}, work, command[1:])
        code = child.end()
        with log.open("a") as file:
            file.write(child.text())
        return code


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_beton(folder, [(16, 16)] * 32, encode="raw")
    return folder / "set.beton"


def parsed(data, out, *words, name="temperature"):
    return parse_study(
        [
            *(name, "--name=base", f"--data.path={data}", f"--train_data={data}", f"--test_data={data}"),
            *(*TINY, "--train.epochs=2", f"--out={out}", *words),
        ]
    )


def test_a_study_trains_measures_goes_on_and_ends_with_a_table(data, tmp_path, capsys):
    out, children = tmp_path / "out", ForkedChildren()
    words = [
        "--rows=0.5; 1; not normalised, 10",
        "--cells=0.5;1",
        "--jobs=2",
        "--protocol=knn",
        "--evaluation_options=--k=[5]",
    ]
    blocked = out / "cells" / "1" / "seed0"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # where the run directory is to be
    name, config, base = parsed(data, out, *words)
    with pytest.raises(RunFailed, match=r"1 of 2 cells failed: 1, seed 0 \(.*seed0.*/cells/1/seed0.log\)"):
        study(name, config, base, words, children)
    first = out / "cells" / "0.5" / "seed0.knn.json"
    before = first.stat().st_mtime_ns
    assert "**Not measured yet, or failed:** 1." in (out / "temperature-knn.md").read_text()

    blocked.unlink()
    children.commands.clear()
    study(name, config, base, words, children)
    assert first.stat().st_mtime_ns == before
    scripts = [Path(command[1]).name for command in children.commands]
    assert scripts == ["pretrain.py", "evaluate.py", "evaluate.py"]  # of the other cell, and random weights
    result = json.loads((out / "temperature-knn.json").read_text())
    assert result["missing"] == []
    for cell, temperature in zip(result["cells"], (0.5, 1.0), strict=True):
        trained = yaml.safe_load((out / "cells" / cell["name"] / "seed0" / "config.yaml").read_text())
        assert trained["model"]["temperature"] == temperature
        (accuracy,) = cell["figures"]["accuracy"]["by_seed"]
        (folder,) = (out / "cells" / cell["name"]).glob("seed0-knn")
        (evaluated,) = folder.glob("*.json")
        assert json.loads(evaluated.read_text())["accuracy"]["all"]["mean"] == accuracy
        assert 0 < accuracy <= 1
    assert {"images to pretrain on", "encoder", "evaluation"} <= {line[0] for line in result["scaled_down"]}
    assert (out / "temperature-knn.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0.5 |" in capsys.readouterr().out

    children.commands.clear()
    study(name, config, base, words, children)
    assert children.commands == []


def test_what_no_protocol_measures(data, tmp_path):
    """Networks that were trained with labels; and what h and z tell of a transformation."""
    children = ForkedChildren()
    words = ["--supervised", "--columns=1/4", "--cells=supervised*"]
    study(*parsed(data, tmp_path / "color", *words, name="color"), words, children)
    (cell,) = json.loads((tmp_path / "color" / "color-linear.json").read_text())["cells"]
    assert (cell["row"], cell["column"]) == ("supervised", "1/4")
    assert cell["figures"]["accuracy"]["mean"] * 32 == pytest.approx(round(cell["figures"]["accuracy"]["mean"] * 32))
    trained = yaml.safe_load((tmp_path / "color" / "cells" / "supervised--1_4" / "seed0" / "config.yaml").read_text())
    assert (trained["model"]["method"], trained["augment"]["color_strength"]) == ("supervised", 0.25)

    study(*parsed(data, tmp_path / "told", "--rows=rotation", name="transform_prediction"), [], children)
    (cell,) = json.loads((tmp_path / "told" / "transform_prediction-transformation.json").read_text())["cells"]
    (measured,) = (tmp_path / "told" / "cells" / "rotation").glob("seed0-*/measured.json")
    task = json.loads(measured.read_text())["details"]["tasks"]["rotation"]
    assert task["in_pretraining"]
    for name in ("h", "z"):
        assert cell["figures"][name]["mean"] == task["measured"][name]["mean"]


def test_only_the_table(data, tmp_path, capsys):
    name, config, base = parsed(data, tmp_path, "--table_only", "--rows=0.5;1", "--num_seeds=2", "--protocol=knn")
    grid = build_grid(CATALOGUE[name], base, rows=["0.5", "1"])
    for trial in trials_of(grid, 2, tmp_path):
        write_record(trial, accuracy=0.5 + 0.25 * trial.seed)
    study(name, config, base, [])
    assert "| 0.5 | 62.5 ± 17.7" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_dry_run_lists_cells_and_leaves_nothing(data, tmp_path, capsys):
    name, config, base = parsed(data, tmp_path / "out", "--dry_run", "--rows=0.5;1", "--num_seeds=2", "--protocol=knn")
    study(name, config, base, [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["0.5, seed 0", "1, seed 0", "0.5, seed 1", "1, seed 1"]
    assert lines[0].startswith("0.5, seed 0: 4 steps of 16 images, 64 in all; encoder of ")
    assert lines[-1] == "4 runs of 2 cells; 256 images to train on in those not yet trained"
    assert not (tmp_path / "out").exists()
    write_record(trials_of(build_grid(CATALOGUE[name], base, rows=["0.5"]), 1, tmp_path / "out")[0], seconds=59.0)
    keep(trials_of(build_grid(CATALOGUE[name], base, rows=["1"]), 1, tmp_path / "out")[0], "trained.json", {})
    study(name, config, base, [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("; ")[2] for line in lines[:4]] == ["measured", "trained", "to do", "to do"]
    assert lines[4].endswith("; 128 images to train on in those not yet trained")
    assert lines[5] == "about 2 minutes at the pace of the 1 measured, 1 at once"


def test_a_folder_belongs_to_one_configuration(data, tmp_path):
    _, _, base = parsed(data, tmp_path)
    varies = CATALOGUE["temperature"].varies
    about = {"train_data": "a", "test_data": "b"}
    claim_study_dir(tmp_path, "temperature", base, about, varies)
    for words in (["--train.log_every=2"], ["--model.temperature=0.2"], ["--name=other"]):
        claim_study_dir(tmp_path, "temperature", parsed(data, tmp_path, *words)[2], about, varies)
    wider = parsed(data, tmp_path, "--model.encoder.width=0.25")[2]
    with pytest.raises(ValueError, match=r"`model.encoder.width` is 0.125 in .*study.json and 0.25 in this study"):
        claim_study_dir(tmp_path, "temperature", wider, about, varies)
    with pytest.raises(ValueError, match=r"`study` is temperature in .* and losses in this study"):
        claim_study_dir(tmp_path, "losses", base, about, varies)
    with pytest.raises(ValueError, match=r"`test_data` is b in .* and c in this study"):
        claim_study_dir(tmp_path, "temperature", base, about | {"test_data": "c"}, varies)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study.json is damaged; remove it"):
        claim_study_dir(tmp_path, "temperature", base, about, varies)


def test_a_cell_of_other_values_is_no_record_of_this_one(data, tmp_path):
    """Of what a study varies, its cells may take more from the base than their names tell."""
    name, config, base = parsed(data, tmp_path, "--rows=16", "--table_only", "--optim.base_lr=0.5", name="lr_scaling")
    write_record(trials_of(build_grid(CATALOGUE[name], base, rows=["16"]), 1, tmp_path)[0], "linear", accuracy=0.5)
    study(name, config, base, [])
    _, config, base = parsed(data, tmp_path, "--rows=16", "--table_only", "--optim.base_lr=1", name="lr_scaling")
    with pytest.raises(ValueError, match=r"`optim.base_lr` is 0.5 in .*16--linear/seed0.linear.json and 1.0 in this"):
        study(name, config, base, [])


def test_figures_under_other_options_of_the_protocol_are_not_those_asked_for(data, tmp_path, capsys):
    words = ["--rows=0.5;1", "--table_only", "--protocol=knn"]
    name, config, base = parsed(data, tmp_path, *words)
    first, second = trials_of(build_grid(CATALOGUE[name], base, rows=["0.5", "1"]), 1, tmp_path)
    write_record(first, accuracy=0.5)
    write_record(second, options=["--k=[5]"], accuracy=0.75)
    random = {"cell": "0.5", "figures": {"accuracy": 0.125}}
    write_json(tmp_path / "random.knn.json", random)
    study(name, config, base, [])
    out = capsys.readouterr().out
    assert "| 0.5 | 50.0 " in out
    assert "| 1 |  |" in out
    assert "with random weights: top-1 12.5" in out
    study(*parsed(data, tmp_path, *words, "--evaluation_options=--k=[5]"), [])
    out = capsys.readouterr().out
    assert "| 0.5 |  |" in out
    assert "| 1 | 75.0 " in out
    assert "random weights" not in out


def test_a_study_goes_on_with_the_sets_that_it_began_with_alone(data, tmp_path):
    """Where they lie may change; what they hold may not."""
    words = ["--rows=0.5", "--table_only", "--protocol=knn"]
    name, config, base = parsed(data, tmp_path / "out", *words)
    write_record(trials_of(build_grid(CATALOGUE[name], base, rows=["0.5"]), 1, tmp_path / "out")[0], accuracy=0.5)
    study(name, config, base, [])
    moved, other = tmp_path / "moved", tmp_path / "other"
    moved.mkdir(), other.mkdir()
    for file in data.parent.glob("set.beton*"):
        shutil.copy(file, moved, follow_symlinks=True)
    make_beton(other, [(16, 16)] * 48, encode="raw")
    study(*parsed(data, tmp_path / "out", *words, f"--data.path={moved}/set.beton"), [])
    for path in (f"--data.path={other}/set.beton", "--data.subset.fraction=0.5"):
        with pytest.raises(
            ValueError, match=r"`data.*. in this study|`data.path` is not the set that this study began"
        ):
            study(*parsed(data, tmp_path / "out", *words, path), [])
    for file in other.glob("set.beton*"):
        shutil.copy(file, moved)
    _, config, base = parsed(data, tmp_path / "out", *words, f"--data.path={moved}/set.beton")
    with pytest.raises(ValueError, match=r"`data.path` is not the set that this study began with \(.*out/data.json\)"):
        study(name, config, base, [])


def test_what_does_not_fit_is_named(data, tmp_path):
    for words, complaint in (
        (["--num_ranks=2"], "`num_ranks` must be 1 without a launcher, got 2"),
        (["--jobs=0"], "`jobs` must be at least 1, got 0"),
        (["--model.heat=1"], "there is no option `model.heat`"),
        (["--table_only", "--dry_run"], "`table_only` must be false with `dry_run`"),
    ):
        with pytest.raises(ValueError, match=complaint):
            parsed(data, tmp_path, *words)
    with pytest.raises(ValueError, match="heat"):
        parsed(data, tmp_path, name="heat")
    with pytest.raises(ValueError, match="`table_only` needs cells that are measured by linear, there are none"):
        study(*parsed(data, tmp_path / "out", "--table_only"), [])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`supervised` belongs to the study color, got temperature"):
        study(*parsed(data, tmp_path, "--supervised"), [])
    with pytest.raises(ValueError, match="`protocol` must be left out for transform_prediction"):
        study(*parsed(data, tmp_path, "--protocol=knn", name="transform_prediction"), [])


def test_told_to_stop_it_stops_its_processes_and_starts_no_more(tmp_path):
    children, codes = Children(), []
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(1, flush=True)"
    command = [sys.executable, "-c", f"{script}; time.sleep(60)"]
    thread = threading.Thread(target=lambda: codes.append(children.call(command, tmp_path / "log")))
    thread.start()
    while "\n1\n" not in (log.read_text() if (log := tmp_path / "log").exists() else ""):
        time.sleep(0.01)
    children.stop()
    thread.join(timeout=30)
    assert codes == [7]
    assert children.call(command, tmp_path / "log") == EXIT_RESUMABLE


def test_a_signal_to_the_thread_that_waits_ends_its_process(tmp_path):
    class Told(Exception):
        pass

    def tell(*_):
        raise Told

    before = signal.signal(signal.SIGUSR1, tell)
    script = "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(Told):
        Children().call([sys.executable, "-c", script], tmp_path / "log")
    signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - started < 50


def test_a_stopped_study_says_so(data, tmp_path):
    """The signal comes while a cell is in the making."""

    class Stopped(ForkedChildren):
        def call(self, command, log):
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.stopping:
                time.sleep(0.01)
            return EXIT_RESUMABLE

    name, config, base = parsed(data, tmp_path, "--rows=0.5")
    with pytest.raises(RunInterrupted, match="stopped; the same command goes on"):
        study(name, config, base, [], Stopped())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert read_json(tmp_path / "cells" / "0.5" / "seed0.trained.json") is None


def test_cells_share_the_cores(data, tmp_path):
    """Each process of a cell may use its share, and no other cell's."""
    cores = sorted(os.sched_getaffinity(0))
    shares = study_runs._shares(2)
    first, second = shares.get(), shares.get()
    assert first | second == set(cores)
    assert not first & second or len(cores) == 1
    seen = []

    class Watching(Children):
        def call(self, command, log):
            seen.append(os.sched_getaffinity(0))
            return 2

    _, _, base = parsed(data, tmp_path)
    grid = build_grid(CATALOGUE["temperature"], base, rows=["0.5"])
    how = HowToRun(base=base, protocol="knn", train_data="a", test_data="b", jobs=2)
    log = tmp_path / "cells" / "0.5" / "seed0.log"
    log.parent.mkdir(parents=True)
    log.touch()
    with pytest.raises(RunFailed, match=r"1 of 1 cells failed: 0.5, seed 0 .ended with code 2"):
        run_trials(trials_of(grid, 1, tmp_path), how, Watching(), lambda _: None)
    assert seen[0] in (first, second)
    assert not log.with_name("seed0.trained.json").exists()
    assert sorted(os.sched_getaffinity(0)) == cores


def test_commands_of_launchers_and_measurements(data, tmp_path):
    _, _, base = parsed(data, tmp_path)
    how = HowToRun(base=base, protocol="knn", train_data="a", test_data="b", launcher="torchrun", num_ranks=2)
    assert launch(how)[1:4] == ["--nproc_per_node", "2", "--master_port"]
    (trial, *_) = trials_of(build_grid(CATALOGUE["transform_prediction"], base, rows=["rotation"]), 1, tmp_path)
    words = measurement(trial, how, tmp_path / "there")
    assert words[1:4] == ["-m", "tools.study_measure", "transformation"]
    assert "--task=rotation" in words
