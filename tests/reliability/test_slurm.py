"""Under a real Slurm a run is told to end, put back into the queue, and goes on as if nothing had happened."""

import re
import sys

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability import held
from tests.reliability import slurm_cluster as slurm
from tests.reliability.processes import assert_same_state, curve, kill_stragglers, last_state
from tests.reliability.record import record
from tests.train.runs import ROOT, TINY, environment, finish, pretrain, start
from train.checkpoint import latest_checkpoint
from train.runtime import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

NUM_IMAGES = 80
STEPS = 60  # 12 epochs of 5 batches of 16
SCRIPT = ROOT / "tools" / "slurm" / "pretrain.sbatch"
OPTIONS = ("--train.epochs=12",)
HELD_AT = (13, 37)  # not at a checkpoint


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with (folder / "daemons.log").open("w") as log, slurm.slurm_cluster(folder, log) as cluster:
        yield cluster


@pytest.fixture
def data(tmp_path):
    return make_beton(tmp_path, [(24, 20)] * NUM_IMAGES, encode="raw").path


@pytest.fixture
def runs_dir(tmp_path):
    yield tmp_path / "runs"
    kill_stragglers(tmp_path / "runs")


def submit(cluster, runs_dir, data, *options, name="run", sbatch=(), python=sys.executable, variables=None):
    """A job of two ranks; returns its number.

    Args:
        python: path of what runs the script.
        variables: for the environment.
    """
    return cluster.command(
        *("sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", f"--chdir={ROOT}"),
        *(f"--output={log_of(runs_dir, name)}", *sbatch),
        *(SCRIPT, runs_dir, name, f"--data.path={data}", *TINY, *options),
        environment=environment() | {"PYTHON": str(python)} | (variables or {}),
    )


def log_of(runs_dir, name="run"):
    return runs_dir.parent / f"{name}.log"


def interpreter(path, *lines):
    """What to give for `python`: a shell script that gets `-u train/pretrain.py …`."""
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    path.chmod(0o755)
    return path


def wait_for_state(cluster, job, state, runs_dir, name="run"):
    def explain():
        return f"{cluster.job(job)}\n{log_of(runs_dir, name).read_text()[-3000:]}"

    slurm.wait_until(lambda: cluster.job(job)["JobState"] == state, explain)


def test_a_job_told_to_end_and_put_back_goes_on_bit_for_bit(cluster, data, runs_dir):
    def log():
        return log_of(runs_dir).read_text()

    port, command = free_port(), pretrain(runs_dir, data, *OPTIONS, name="reference")
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"} for rank in (0, 1)]
    reference = [start(command, {k: str(v) for k, v in (rank | {"MASTER_PORT": port}).items()}) for rank in ranks]
    unfit = submit(cluster, runs_dir, runs_dir / "nothing.beton", name="unfit")
    hold = held.Hold(runs_dir.parent, *HELD_AT)
    python = interpreter(runs_dir.parent / "held.sh", f'exec {sys.executable} -u {held.SCRIPT} "${{@:2}}"')
    job = submit(cluster, runs_dir, data, *OPTIONS, python=python, variables=hold.variables)

    slurm.wait_until(lambda: hold.reached(HELD_AT[0]), log)
    cluster.command("scancel", "--signal=TERM", job)  # to the ranks and not the script, as `--signal` does
    wait_for_state(cluster, job, "PENDING", runs_dir)
    stopped_at = last_state(runs_dir / "run").position["step"]
    assert stopped_at in (HELD_AT[0], HELD_AT[0] + 1)
    assert f"stopped by SIGTERM after step {stopped_at}, with a checkpoint" in log()
    assert f"ended with code 75, latest checkpoint {latest_checkpoint(runs_dir / 'run').name};" in log()

    cluster.start_again(job, log)
    slurm.wait_until(lambda: hold.reached(HELD_AT[1]), log)
    cluster.command("scontrol", "requeue", job)  # as where another job has to go first: Slurm ends the script too
    wait_for_state(cluster, job, "PENDING", runs_dir)
    cluster.start_again(job, log)
    wait_for_state(cluster, job, "COMPLETED", runs_dir)
    assert cluster.job(job)["Restarts"] == "2"
    stops = [int(step) for step in re.findall(r"stopped by SIGTERM after step (\d+)", log())]
    assert stops in ([stopped_at, HELD_AT[1]], [stopped_at, HELD_AT[1] + 1])

    for process in reference:
        code, _, err = finish(process)
        assert code == 0, err[-3000:]
    assert last_state(runs_dir / "run").position["step"] == STEPS
    assert_same_state(last_state(runs_dir / "run"), last_state(runs_dir / "reference"))
    assert curve(runs_dir / "run") == curve(runs_dir / "reference")
    check_bad_input_is_not_tried_again(cluster, unfit, runs_dir)
    record(
        fault="Slurm ends the job",
        done="a real slurmctld and slurmd, 2 ranks by `srun`; SIGTERM to the steps, then `scontrol requeue`",
        runs=3,
        lost_steps=0,
        result="checkpoint, exit code 75, put back into the queue; goes on bit for bit. Bad input is not tried again",
    )


def check_bad_input_is_not_tried_again(cluster, job, runs_dir, name="unfit"):
    wait_for_state(cluster, job, "FAILED", runs_dir, name)
    known = cluster.job(job)
    assert (known["ExitCode"], known["Restarts"]) == ("2:0", "0")
    assert "error: " in log_of(runs_dir, name).read_text()


def test_what_one_rank_alone_refuses_is_not_tried_again(cluster, data, runs_dir):
    """The other, which waits for it, is killed."""
    lacking = f'((SLURM_PROCID == 1)) && set -- "$@" --data.path={runs_dir}/nothing.beton'
    python = interpreter(runs_dir.parent / "python.sh", lacking, f'exec {sys.executable} "$@"')
    job = submit(cluster, runs_dir, data, name="lacking", python=python, variables={"SLURM_WAIT": "5"})
    check_bad_input_is_not_tried_again(cluster, job, runs_dir, "lacking")
    assert "task 0: " in log_of(runs_dir, "lacking").read_text()


@pytest.mark.slow
def test_the_time_limit_stops_a_job_in_time(cluster, data, runs_dir):
    """What sbatch promises: the signal some time before the limit; it may come up to a minute early."""
    limit = ("--time=3", "--signal=TERM@30")
    job = submit(cluster, runs_dir, data, "--train.epochs=10000", "--train.checkpoint_every=50", sbatch=limit)
    wait_for_state(cluster, job, "RUNNING", runs_dir)  # before, it is pending, too
    wait_for_state(cluster, job, "PENDING", runs_dir)
    stopped_at = last_state(runs_dir / "run").position["step"]
    assert f"stopped by SIGTERM after step {stopped_at}, with a checkpoint" in log_of(runs_dir).read_text()
    assert cluster.job(job)["Reason"] != "TimeLimit"
    cluster.command("scancel", job)
    record(
        fault="Slurm's time limit is near",
        done="`--time=3 --signal=TERM@30` in tools/slurm/pretrain.sbatch",
        runs=1,
        lost_steps=0,
        result="checkpoint, exit code 75, put back into the queue before the limit",
    )


def test_a_job_that_never_comes_to_a_checkpoint_is_given_up(cluster, data, runs_dir):
    python = interpreter(runs_dir.parent / "python.sh", "echo begun; exec sleep infinity")
    job, log = submit(cluster, runs_dir, data, python=python), log_of(runs_dir)
    for kills in range(1, 5):
        slurm.wait_until(lambda begun=2 * kills: log.exists() and log.read_text().count("begun") == begun)
        cluster.command("scancel", "--signal=KILL", f"{job}.0")
        wait_for_state(cluster, job, "PENDING" if kills < 4 else "FAILED", runs_dir)
        if kills < 4:
            cluster.start_again(job, log.read_text)
    assert log.read_text().count("ended with code 137, latest checkpoint none; putting") == 3
    assert "error: ended with code 137, 4 times in a row without a new checkpoint; not started again" in log.read_text()
    assert cluster.job(job)["Restarts"] == "3"
    assert not (runs_dir / "run" / "fruitless_restarts").exists()
    record(
        fault="Slurm: the ranks are killed at every start",
        done="SIGKILL to the ranks before the first checkpoint, four times",
        runs=4,
        lost_steps=0,
        result="put back into the queue three times, then given up",
    )
