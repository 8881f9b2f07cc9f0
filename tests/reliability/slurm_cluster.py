"""A Slurm of one node while a test runs: munged, slurmctld and slurmd of this machine, in a folder of their own."""

import os
import random
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from tests.reliability.processes import PATIENCE_S
from train.runtime import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
STARTED = ("RUNNING", "COMPLETED", "FAILED")


def why_not():
    """What this machine lacks for a Slurm of its own; empty: nothing."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd of a Slurm of one's own need root"


class SlurmCluster:
    """Commands to a Slurm of one's own.

    Attributes:
        environment: what its commands, and jobs, need beside the usual.
    """

    def __init__(self, folder):
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *words, environment=None):
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            [str(word) for word in words],
            env=(environment or os.environ) | self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number):
        """What Slurm knows of a job: {"JobState": "RUNNING", "Restarts": "0", …}."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_again(self, number, explain):
        """A job that was put back into the queue waits for two minutes; not this one.

        Slurm sets that time only when the last of the job's processes is gone, so it is looked at until the job runs.
        Two seconds have to pass: a job that begins within the very second in which it was ended is refused by its node
        ("already killed, do not launch batch job"), and given up.
        """

        def runs():
            known = self.job(number)
            if known["JobState"] in STARTED:
                return True
            if starts_later_than(known["StartTime"], seconds=3):
                words = ["scontrol", "update", f"JobId={number}", "StartTime=now+2"]
                subprocess.run(words, env=os.environ | self.environment, capture_output=True, check=False)
            return False

        wait_until(runs, explain)


def starts_later_than(time_told, *, seconds):
    """Whether a time as Slurm tells it is so far ahead."""
    return time_told != "Unknown" and datetime.fromisoformat(time_told) > datetime.now() + timedelta(seconds=seconds)


@contextmanager
def slurm_cluster(folder, log):
    """A `SlurmCluster` of this machine with a node of four tasks, ended with its jobs.

    Args:
        folder: for its state; not shared with anything.
        log: an open file for what the daemons print.
    """
    host = socket.gethostname().partition(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    munge_socket = folder / "munge.socket"
    (folder / "slurm.conf").write_text(configuration(folder, host, munge_socket))
    munge_files = {"key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", f"--socket={munge_socket}"]
    munged += [f"--{option}={folder / name}" for option, name in munge_files.items()]
    cluster = SlurmCluster(folder)
    daemons = []

    def log_text():
        return Path(log.name).read_text()[-3000:]

    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(
                subprocess.Popen(command, env=os.environ | cluster.environment, stdout=log, stderr=log, cwd=folder)
            )
            if command is munged:
                wait_until(munge_socket.exists, log_text)
        wait_until(lambda: is_idle(cluster), log_text)
        yield cluster
    finally:
        try:
            if len(daemons) == len(DAEMONS):  # else there was no job
                end_jobs(cluster, log_text)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(PATIENCE_S)


def end_jobs(cluster, explain):
    """At once: without a job's half minute to save what it has."""
    cluster.command("scancel", "--user=root", "--full", "--signal=KILL")
    cluster.command("scancel", "--user=root")
    wait_until(lambda: not cluster.command("squeue", "--noheader"), explain)


def wait_until(condition, explain=lambda: "", timeout_s=PATIENCE_S):
    """`explain()`: what is told where the time runs out."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {explain()}"
        time.sleep(0.1)


def is_idle(cluster):
    try:
        return cluster.command("sinfo", "--noheader", "--format=%T") == "idle"
    except AssertionError:  # slurmctld does not listen yet
        return False


def configuration(folder, host, munge_socket):
    values = {
        "ClusterName": "trial",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={munge_socket}",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SchedulerType": "sched/builtin",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",  # the node has as many cores as is said here
        "MpiDefault": "none",
        "ReturnToService": 2,
        "KillWait": PATIENCE_S,  # a job that is told to end has all the time that it needs
        "FirstJobId": random.randrange(1, 12_000),  # the ranks' port follows from it: not that of another test
    }
    lines = [f"{name}={value}" for name, value in values.items()]
    lines += [f"NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN", f"PartitionName=all Nodes={host} Default=YES"]
    return "\n".join(lines) + "\n"
