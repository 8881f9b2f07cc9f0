"""Ranks from the variables of a Slurm step; the values are those that Slurm 22.05 set."""

import pytest

from train.slurm import first_host, slurm_ranks, tasks_per_node

BATCH_SCRIPT = {  # outside of `srun`: a task's number, and no step
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_NODELIST": "node[07-09]",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
STEP = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_a_task_of_a_step_is_a_rank():
    assert slurm_ranks(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "10044",
    }


def test_nodes_may_have_different_numbers_of_tasks():
    last = slurm_ranks(STEP | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert (last["RANK"], last["LOCAL_RANK"], last["LOCAL_WORLD_SIZE"]) == ("4", "0", "1")


def test_a_step_on_fewer_nodes_than_its_job_counts_its_own():
    smaller = STEP | {"SLURM_STEP_NODELIST": "node09", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    ranks = slurm_ranks(smaller | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (ranks["WORLD_SIZE"], ranks["LOCAL_WORLD_SIZE"], ranks["MASTER_ADDR"]) == ("1", "1", "node09")


def test_a_batch_script_itself_is_one_process():
    assert slurm_ranks(BATCH_SCRIPT) == {}
    assert slurm_ranks({}) == {}


def test_tasks_of_a_step_agree_on_a_port_and_other_steps_and_jobs_have_others():
    def port(job, step, task="0"):
        return int(
            slurm_ranks(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_PROCID": task})["MASTER_PORT"]
        )

    assert port("41", "3", "0") == port("41", "3", "4")
    assert len({port("41", "3"), port("41", "4"), port("43", "3")}) == 3
    assert 10_000 <= port("123456789", "7") < 30_000


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[07-09,12],login", "node07"),
        ("node[3,5]", "node3"),
        ("login,node[07-09]", "login"),
        ("rack[2-3]n[01-04],x", "rack2n01"),
        ("gpu-a[1-2]-ib.cluster", "gpu-a1-ib.cluster"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


def test_tasks_per_node():
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("2,4(x3)") == [2, 4, 4, 4]
