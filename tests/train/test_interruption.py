"""Signals: when a process takes them, and how ranks agree on the step to stop after."""

import os
import signal
from datetime import timedelta

import pytest
import torch

from tests.distributed.ranks import run_ranks
from train.cli import EXIT_INTERRUPTED, EXIT_RESUMABLE
from train.interruption import SIGNALS, Interruption, stopped
from train.runtime import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)


def send(number):
    os.kill(os.getpid(), number)


def test_before_the_run_begins_signals_do_what_they_did():
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_once_it_has_begun_a_signal_is_a_wish(number):
    with Interruption() as interruption:
        interruption.begin(ALONE)
        assert interruption.agreed() == 0
        send(number)
        assert interruption.agreed() == number


def test_a_signal_that_the_parent_blocked_is_heard():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with Interruption() as interruption:
            interruption.begin(ALONE)
            send(signal.SIGTERM)
            assert interruption.agreed() == signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def test_a_second_ctrl_c_does_not_wait():
    with Interruption() as interruption:
        interruption.begin(ALONE)
        send(signal.SIGTERM)
        send(signal.SIGINT)  # the first
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_afterwards_signals_do_what_they_did():
    def ours(*_):
        pass

    signal.signal(signal.SIGUSR1, ours)
    with Interruption() as interruption:
        interruption.begin(ALONE)
        assert signal.getsignal(signal.SIGUSR1) is not ours
    assert signal.getsignal(signal.SIGUSR1) is ours


def test_what_is_told_names_signal_and_step_and_asks_for_the_same_command():
    error = stopped(signal.SIGTERM, 1234)
    assert str(error) == "stopped by SIGTERM after step 1234, with a checkpoint; the same command goes on"
    assert (error.code, stopped(signal.SIGINT, 1).code) == (EXIT_RESUMABLE, EXIT_INTERRUPTED) == (75, 130)


def steps_until_agreed(rank, world_size, signalled):
    """How many steps this rank does when rank r is signalled during step `signalled[r]`; and for which signal it stops.

    There is no other collective in these steps: ranks run apart, as on GPUs.
    """
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    with Interruption() as interruption:
        interruption.begin(ranks, timedelta(hours=3))
        assert interruption._group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=3)
        for step in range(1, 100):
            if signalled.get(rank, (0, 0))[0] == step:
                send(signalled[rank][1])
            heard = interruption.agreed()
            if heard:
                break
        interruption.conclude()
    return step, heard


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signalled", "expected"),
    [
        ({1: (5, signal.SIGTERM)}, (6, signal.SIGTERM)),  # read one step after it was told
        ({0: (7, signal.SIGTERM), 2: (5, signal.SIGTERM)}, (6, signal.SIGTERM)),
        ({}, (99, 0)),
    ],
)
def test_all_ranks_stop_after_the_same_step(signalled, expected):
    assert run_ranks(steps_until_agreed, 3, 3, signalled) == [expected] * 3
