"""Where a process that `srun` started stands among its kind, from the variables that Slurm sets in every step.

Source: "OUTPUT ENVIRONMENT VARIABLES" of srun(1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that Linux gives out by itself, from 32768 on


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch's rendezvous reads, as this Slurm step determines them; empty outside of a step.

    A batch script has a task's number too, but no step: what it starts without `srun` is one process.

    Args:
        environ: of the process.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The master is the step's first
        host, and the port follows from the numbers of job and step, so that all tasks know both without asking.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return {}
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (job + step) % NUM_PORTS),
    }


def first_host(hosts: str) -> str:
    """The first of a list of hosts as Slurm writes it: `node[07-09,12],login` begins with `node07`."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node from Slurm's short form: `4(x2),1` is [4, 4, 1]."""
    tasks: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(number)] * int(times or 1)
    return tasks
