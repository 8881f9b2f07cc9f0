"""Ranks that hang or vanish, as real processes: stopped, killed, stuck, at fault."""

import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.reliability.forked import Forked, variables_of
from train.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_RESUMABLE, RunFailed, run
from train.heartbeats import Standing, is_of_a_collective, seconds_between
from train.runtime import Ranks, free_port
from train.watchdog import Watchdog, last_ranks

TIMEOUT_S = 4.0  # as long as a rank that is well may take for a step on a busy machine
STEPS = 3


class Outcome:
    """How a rank ended, what it said, and what is in its log."""

    def __init__(self, process, folder, rank):
        self.code, self.err = process.process.exitcode, process.errors()
        self.log = Path(folder, f"log{rank}").read_text()


def ranks_that(folder, *behaviours, timeout_s=TIMEOUT_S, ends=None):
    """Run one process for each behaviour, `behaviour(watchdog, rank)`, as ranks of one group.

    `ends`: the ranks to wait for; the others, which stand still, are killed after them.
    """
    port, world_size = free_port(), len(behaviours)
    processes = [
        Forked(
            folder / f"output{rank}",
            variables_of(rank, world_size, port),
            one_rank,
            *(behaviour, rank, world_size, folder, timeout_s),
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    try:
        for rank in range(world_size) if ends is None else ends:
            processes[rank].end()
    finally:
        for process in processes:
            process.kill()
    return [Outcome(process, folder, rank) for rank, process in enumerate(processes)]


def one_rank(behaviour, rank, world_size, folder, timeout_s):
    """As `train/pretrain.py` goes about it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks for the host's own name, which may not resolve
    torch.set_num_threads(1)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)

    def main():
        if world_size > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        with Watchdog(ranks, timeout_s=timeout_s, log_file=Path(folder, f"log{rank}")) as watchdog:
            try:
                behaviour(watchdog, rank)
            except RuntimeError as error:
                explained = watchdog.explain(error)
                if explained is not None:
                    raise explained from error
                raise

    run(main)


def train(watchdog, rank, fault=None, at=STEPS - 1):
    """Steps that end in a collective; `fault` happens while data are loaded, once the others have heard of that."""
    for step in range(STEPS):
        watchdog.beat(step, "loading data")
        if fault is not None and step == at:
            be_heard(watchdog)
            fault()
        watchdog.beat(step, "training step")
        if dist.is_initialized():
            dist.all_reduce(torch.ones(8))


def be_heard(watchdog):
    """Until a message of where this rank stands is out, and the others have had the time to read it."""
    heartbeats = watchdog._heartbeats
    if heartbeats is not None:
        last = heartbeats._number + 3
        while heartbeats._number < last:
            time.sleep(0.01)


def stop(watchdog, rank):
    train(watchdog, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def crash(watchdog, rank):
    train(watchdog, rank, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def get_stuck(watchdog, rank):
    train(watchdog, rank, wait_for_data_that_never_come)


def wait_for_data_that_never_come():
    while True:
        time.sleep(0.1)


def meet_bad_data(watchdog, rank):
    def fault():
        raise ValueError("sample 13 cannot be decoded")

    train(watchdog, rank, fault)


def take_long(watchdog, rank):
    """Longer than the timeout, and with signs of life."""
    since = time.monotonic()
    while time.monotonic() < since + 1.2 * TIMEOUT_S:
        watchdog.beat(STEPS, "evaluating")
        time.sleep(TIMEOUT_S / 40)


def train_and_take_long(watchdog, rank):
    train(watchdog, rank)
    take_long(watchdog, rank)


def be_suspended(watchdog, rank):
    """Stopped for longer than the timeout, and continued."""
    waker = subprocess.Popen(["sh", "-c", f"sleep {1.5 * TIMEOUT_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    assert waker.wait() == 0
    time.sleep(TIMEOUT_S / 2)  # the watchdog looks five times


def only_line(outcome):
    assert len(outcome.err) == 1, outcome.err
    return outcome.err[0]


def without_seconds(line):
    """With N for every number of whole seconds, each of which is the timeout or, on a busy machine, more."""
    assert all(int(seconds) >= TIMEOUT_S / 2 for seconds in re.findall(r"(\d+) s ", line)), line
    return re.sub(r"\b\d+ s\b", "N s", line)


@pytest.mark.distributed
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path):
    first, _, other = ranks_that(tmp_path, train, stop, train, ends=(0, 2))
    assert (first.code, other.code) == (EXIT_RESUMABLE, EXIT_RESUMABLE)
    line = without_seconds(only_line(first))
    assert line.startswith("error: rank 1 has hung: last heard of N s ago, at step 2, loading data; ")
    assert f"; rank 0 waited N s at step 2, training step. Stacks of all threads are in {tmp_path}/log0; " in line
    assert line.endswith("; the same command goes on from the last checkpoint")
    assert not other.err  # one line for all
    for outcome in (first, other):
        assert "in all_reduce" in outcome.log
        assert "in train" in outcome.log


@pytest.mark.distributed
def test_the_rank_that_keeps_the_store_is_named_as_well(tmp_path):
    """Whatever a rank asks of the store then waits for ever; the run ends all the same."""
    _, *others = ranks_that(tmp_path, stop, train, train, ends=(1, 2))
    assert [outcome.code for outcome in others] == [EXIT_RESUMABLE, EXIT_RESUMABLE]
    line = without_seconds(only_line(others[0]))
    assert line.startswith("error: rank 0 has hung: last heard of N s ago, at step 2, loading data; ")
    assert not others[1].err


@pytest.mark.distributed
def test_a_rank_that_is_stuck_is_named_though_it_is_heard_of(tmp_path):
    first, stuck = ranks_that(tmp_path, train, get_stuck)
    assert first.code == EXIT_RESUMABLE
    assert stuck.code == EXIT_RESUMABLE
    line = without_seconds(only_line(first))
    assert line.startswith("error: rank 1 has hung: at step 2, loading data, for N s; rank 0 waited N s at ")
    assert not stuck.err
    assert "in wait_for_data_that_never_come" in stuck.log


@pytest.mark.distributed
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_vanishes_is_named(tmp_path, lost):
    behaviours = [train, train, train]
    behaviours[lost] = crash
    outcomes = ranks_that(tmp_path, *behaviours)
    vanished = outcomes.pop(lost)
    assert vanished.code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in vanished.log
    assert "in crash" in vanished.log
    assert [outcome.code for outcome in outcomes] == [EXIT_RESUMABLE, EXIT_RESUMABLE]
    told = [outcome.err[0] for outcome in outcomes if outcome.err]
    assert len(told) == (2 if lost == 0 else 1)
    for line in told:
        assert re.search(rf"rank {lost} was lost at step 2 \(last heard of \d+\.\d s ago, loading data\): ", line), line
        assert "Connection" in line
        assert line.endswith("; the same command goes on from the last checkpoint")


@pytest.mark.distributed
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_that_fails_tells_the_others_why(tmp_path, faulty):
    """The same command would meet it again: the others do not say otherwise."""
    behaviours = [train, train]
    behaviours[faulty] = meet_bad_data
    outcomes = ranks_that(tmp_path, *behaviours)
    assert outcomes[faulty].code == EXIT_BAD_INPUT
    assert only_line(outcomes[faulty]) == f"error: rank {faulty}: sample 13 cannot be decoded"
    assert outcomes[1 - faulty].code == EXIT_FAILED
    told = [] if faulty == 0 else ["error: rank 1 stopped at step 2: sample 13 cannot be decoded"]
    assert outcomes[1 - faulty].err == told


@pytest.mark.distributed
def test_who_hangs_because_another_failed_does_not_promise_that_the_same_command_goes_on(tmp_path):
    """As under NCCL, which does not notice that a rank has left."""
    first, faulty = ranks_that(tmp_path, get_stuck, meet_bad_data)
    assert (first.code, faulty.code) == (EXIT_FAILED, EXIT_BAD_INPUT)
    line = without_seconds(only_line(first))
    assert line.startswith("error: rank 1 stopped at step 2: sample 13 cannot be decoded; rank 0 waited N s at ")
    assert "the same command" not in line
    assert "in wait_for_data_that_never_come" in first.log


@pytest.mark.distributed
@pytest.mark.parametrize("slow", [0, 1])
def test_long_phases_and_a_slow_farewell_are_no_alarm(tmp_path, slow):
    behaviours = [train, train]
    behaviours[slow] = train_and_take_long
    for outcome in ranks_that(tmp_path, *behaviours):
        assert outcome.code == 0
        assert not outcome.err
        assert not outcome.log


def test_a_process_of_its_own(tmp_path):
    (hung,) = ranks_that(tmp_path, get_stuck)
    assert hung.code == EXIT_RESUMABLE
    line = without_seconds(only_line(hung))
    assert line.startswith("error: the run has hung: at step 2, loading data, for N s. Stacks of all threads are in ")
    assert "in wait_for_data_that_never_come" in hung.log
    (suspended,) = ranks_that(tmp_path, be_suspended)
    assert suspended.code == 0
    (patient,) = ranks_that(tmp_path, take_long, timeout_s=0)
    assert patient.code == 0


def standing(step, phase, left=""):
    return Standing(step=step, phase=phase, doing="something", seconds=1.0, left=left)


@pytest.mark.parametrize(
    ("where", "to_blame"),
    [
        ({0: standing(7, 1), 1: standing(6, 3), 2: standing(7, 1)}, [1]),
        ({0: standing(7, 1), 1: standing(7, 0), 2: standing(7, 0)}, [1, 2]),
        ({0: standing(7, 1), 1: standing(7, 1)}, [0, 1]),
        ({0: standing(7, 1), 1: standing(9, 0, left="it met something")}, [1]),
        ({0: standing(9, 1), 1: standing(9, 1, left="it was done")}, [0]),
    ],
)
def test_who_stands_furthest_back_is_to_blame(where, to_blame):
    assert last_ranks(where) == to_blame


def test_many_ranks_write_less_often():
    assert seconds_between(8, most=60.0) == 1.0
    assert seconds_between(8, most=0.2) == 0.2
    assert seconds_between(1024, most=60.0) == 16.0


def test_only_errors_of_collectives_are_explained():
    error = RuntimeError("the step failed")
    error.__cause__ = dist.DistNetworkError("Connection reset by peer")
    assert is_of_a_collective(error)
    assert is_of_a_collective(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error"))
    assert not is_of_a_collective(RuntimeError("out of memory"))
    assert not is_of_a_collective(RunFailed("step 3 is not finite"))
