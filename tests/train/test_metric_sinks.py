"""The trackers: real clients in real processes, through kills and resumes, without a network, without a login."""

import importlib.util
import json
import logging
import math
import signal
import struct
import subprocess
import sys
import time
import warnings

import psutil
import pytest

from tests.reliability.processes import PATIENCE_S
from tests.train.runs import ROOT, environment
from train.cli import UnfitEnvironment
from train.metric_sinks import TrackedRun
from train.metrics import LogConfig, MetricsWriter, check_sinks, read_metrics
from train.runtime import free_port

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")

PROGRAM = """
import json, logging, os, sys, time
sys.path[0] = os.getcwd()
from pathlib import Path
from train.metrics import LogConfig, MetricsWriter, check_sinks
import train.cli
logging.basicConfig(format="%(levelname)s: %(message)s")
run_dir, resume_step, last_step, then, config, init_timeout_s = json.loads(sys.argv[1])

def main():
    log = LogConfig(**config)
    check_sinks(log)
    if log.wandb:
        import train.metric_sinks_wandb
        train.metric_sinks_wandb.INIT_TIMEOUT_S = init_timeout_s
    resolved = {"optim": {"base_lr": 0.3, "form": "classic"}, "sizes": [[0, 16]], "none": None}
    with MetricsWriter(
        Path(run_dir), resume_step=resume_step, config=log, run_name="sunny", resolved=resolved
    ) as writer:
        for step in range(resume_step + 1, last_step + 1):
            writer.write(step, {"loss": step / 2, "odd": {2: float("nan"), 3: float("inf")}.get(step, 1.0)})
        if then == "wait":
            Path(run_dir, "written").touch()
            time.sleep(600)

train.cli.run(main)
"""


def start(run_dir, resume_step, last_step, *, then="end", env=None, init_timeout_s=PATIENCE_S, **config):
    """A process that writes the lines after `resume_step` up to `last_step`."""
    arguments = json.dumps([str(run_dir), resume_step, last_step, then, config, init_timeout_s])
    home = run_dir.parent / "home"  # nobody is logged in
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, arguments],
        cwd=ROOT,
        env=environment()
        | {"WANDB_MODE": "offline", "WANDB__SERVICE_WAIT": str(PATIENCE_S), "MLFLOW_ALLOW_FILE_STORE": "true"}
        | {"HOME": str(home), "NETRC": str(home / "netrc")}
        | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def wandb_records(file):
    """What lies in a W&B file, which is in LevelDB's log format after a header of 7 bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wandb.proto import wandb_internal_pb2
    data, position, payload = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7 + length
        if position > len(data):
            return
        payload += data[position - length : position]
        if kind in {1, 4}:  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def wandb_history(run_dir):
    """Each W&B run folder's lines, in order: [(id, [(step, {name: value})])]."""
    folders = []
    for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        run_id, lines = None, []
        for record in wandb_records(file):
            if record.HasField("run"):
                run_id = record.run.run_id
            if record.HasField("history"):
                items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                lines.append((items["_step"], {name: float(items[name]) for name in sorted(items) if name[0] != "_"}))
        folders.append((run_id, lines))
    return folders


def mlflow_run(uri):
    """The only run of a store, and each of its metrics' points."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("twinview")
        (run,) = client.search_runs([experiment.experiment_id])
        points = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }
    return run, points


def await_(condition, process):
    """Wait until the condition holds; the process must not end before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def step_values(steps):
    return [(step, {"loss": step / 2, "odd": {2: math.nan, 3: math.inf}.get(step, 1.0)}) for step in steps]


@needs_wandb
@needs_mlflow
def test_a_killed_and_resumed_run_is_one_run_with_every_step_once(tmp_path):
    run_dir, uri = tmp_path / "run", f"file://{tmp_path}/store"
    config = {"wandb": True, "mlflow": True, "mlflow_uri": uri}
    process = start(run_dir, 0, 6, then="wait", **config)
    await_((run_dir / "written").exists, process)
    await_(lambda: TrackedRun(run_dir / "mlflow.json").sent == 6, process)
    await_(lambda: [step for _, lines in wandb_history(run_dir) for step, _ in lines][-1:] == [6], process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("wandb-core" in child.name() for child in children)
    process.send_signal(signal.SIGKILL)
    assert finish(process) == (-signal.SIGKILL, "", "")  # not a word on our console
    assert psutil.wait_procs(children, timeout=PATIENCE_S)[1] == []  # and nobody is left behind
    assert mlflow_run(uri)[0].info.status == "RUNNING"

    assert finish(start(run_dir, 4, 8, **config)) == (0, "", "")
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    (first_id, first), (second_id, second) = wandb_history(run_dir)
    assert first_id == second_id == json.loads((run_dir / "wandb.json").read_text())["id"]
    assert repr(first) == repr(step_values(range(1, 7)))  # by their text, since no NaN equals another
    assert repr(second) == repr(step_values([7, 8]))
    run, points = mlflow_run(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "sunny"
    assert run.data.params == {
        "optim.base_lr": "0.3",
        "optim.form": "classic",
        "sizes": "[[0, 16]]",
        "none": "null",
    }
    assert points["loss"] == [(step, step / 2) for step in range(1, 9)]
    assert repr(points["odd"][:4]) == "[(1, 1.0), (2, nan), (3, inf), (4, 1.0)]"


@needs_wandb
@needs_mlflow
def test_without_a_network_lines_are_kept_and_follow(tmp_path):
    run_dir, uri = tmp_path / "run", f"file://{tmp_path}/store"
    nowhere = f"http://127.0.0.1:{free_port()}"
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": nowhere}
    code, out, err = finish(
        start(run_dir, 0, 3, env=env, init_timeout_s=2.0, wandb=True, mlflow=True, mlflow_uri=nowhere)
    )
    assert (code, out) == (0, "")
    wandb, mlflow, last = err.splitlines()
    assert wandb.startswith("WARNING: W&B cannot be reached (")
    assert wandb.endswith(f"); its lines stay in {run_dir}/wandb, and `wandb sync` uploads them")
    assert [step for _, lines in wandb_history(run_dir) for step, _ in lines] == [1, 2, 3]
    assert mlflow.startswith(f"WARNING: MLflow does not take metrics: API request to {nowhere}/")
    assert mlflow.endswith("; they are kept and sent later")
    assert last == "WARNING: MLflow did not take 3 lines of metrics; they follow when the run is resumed"

    assert finish(start(run_dir, 3, 4, mlflow=True, mlflow_uri=uri)) == (0, "", "")
    assert mlflow_run(uri)[1]["loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


@needs_wandb
def test_somebody_must_be_logged_in(tmp_path):
    code, out, err = finish(start(tmp_path / "run", 0, 3, env={"WANDB_MODE": "online"}, wandb=True))
    assert (code, out) == (2, "")
    assert err == "error: `log.wandb` needs an API key; run `wandb login`, or set WANDB_MODE=offline\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow (or mlflow-skinny)")], ids=["wandb", "mlflow"]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).mkdir()  # such as W&B's own folder of runs: no package, though Python could import it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    check_sinks(LogConfig())
    with pytest.raises(UnfitEnvironment) as caught:
        check_sinks(LogConfig(**{name: True}))
    assert str(caught.value) == f"`log.{name}` needs the package {package}, which is not installed; pip install it"


def test_other_ranks_start_no_tracker(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False, config=LogConfig(wandb=True, mlflow=True)) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["wandb_project", "mlflow_experiment"])
def test_names_must_not_be_empty(field):
    with pytest.raises(ValueError, match=rf"^`log\.{field}` must not be empty$"):
        LogConfig(**{field: " "})


def test_a_damaged_memory_of_a_tracker_is_told_and_begins_anew(tmp_path, caplog):
    file = tmp_path / "wandb.json"
    tracked = TrackedRun(file)
    assert (tracked.id, tracked.sent) == (None, 0)
    tracked.begin("abc")
    tracked.advance(40)
    assert (TrackedRun(file).id, TrackedRun(file).sent) == ("abc", 40)
    for damaged in ("", '{"id": "abc"', "[]", '{"id": "abc"}'):
        file.write_text(damaged)
        with caplog.at_level(logging.WARNING):
            assert TrackedRun(file).id is None
        assert caplog.messages == [f"{file} is damaged; the tracker begins a new run"]
        caplog.clear()
