"""The run that the fault tests interrupt, and the one that nothing interrupts, which they are compared with."""

import fcntl
import json
import os
from pathlib import Path

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Run
from tests.reliability.processes import assert_same_state, curve
from train.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint
from train.metrics import METRICS_FILE

NUM_IMAGES, BATCH_SIZE = 160, 16
STEPS = 80  # 8 epochs of 10 batches of 16
OPTIONS = (  # everything whose state must survive, on two ranks
    "--train.epochs=8",
    "--train.ema_decay=0.9",
    "--train.micro_batch_size=4",
    "--train.zero_stage=2",
    "--online.linear_probe=true",
    "--train.keep_best=probe_accuracy",
)
EVERY_STEP = ("--train.checkpoint_every=1", "--train.keep_checkpoints=100")


def whole_run(tmp_path_factory):
    """The data, and the run directory of an uninterrupted run with a checkpoint of every step; made once a session.

    To be the value of a fixture, in each process that runs tests.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in the session's
        session = session.parent
    folder = session / "whole_run"
    folder.mkdir(exist_ok=True)
    data, runs_dir = folder / "set.beton", folder / "runs"
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(folder, "done").exists():
            make_beton(folder, [(24, 20)] * NUM_IMAGES)
            runs_dir.mkdir()
            with Run(runs_dir, data, *OPTIONS, *EVERY_STEP) as run:
                run.assert_done()
            Path(folder, "done").touch()
    return data, runs_dir / "run"


def last_step(run_dir):
    """The step of the newest checkpoint; 0 without one."""
    path = latest_checkpoint(run_dir)
    return 0 if path is None else load_checkpoint(path).position["step"]


def steps_told(run_dir):
    """How many steps the metrics of a run in progress tell of."""
    path = run_dir / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("\n") else 0


def assert_as_uninterrupted(run_dir, whole):
    """Bit for bit: the newest checkpoint, and every metric of every step up to there, each once."""
    step = last_step(run_dir)
    assert step > 0
    assert_same_state(load_checkpoint(latest_checkpoint(run_dir)), load_checkpoint(checkpoint_path(whole, step)))
    ours = curve(run_dir)
    assert [line["step"] for line in ours] == list(range(1, len(ours) + 1))
    assert len(ours) >= step
    assert ours == curve(whole)[: len(ours)]
