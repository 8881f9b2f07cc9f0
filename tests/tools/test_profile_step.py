"""Every moment of a step belongs to one part of it."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tools.profile_communication import METHODS, communication_named
from tools.profile_step import StepClock
from train.stages import listening, stage

NOTHING = dict.fromkeys(("forward", "loss", "backward", "communication", "optimizer"), 0.0)


def clock():
    """One that goes on by a second whenever it is read."""
    return StepClock(torch.device("cpu"), itertools.count(0.0).__next__)


def test_each_moment_counts_for_the_innermost_stretch():
    watch = clock()
    with listening(watch):
        for _ in range(2):
            with watch.step():  # reads: 1 forward 2 communication 3 forward 4 rest 5 backward 6 rest 7
                with stage("forward"), stage("communication"):
                    pass
                with stage("backward"):
                    pass
    once = NOTHING | {"forward": 2.0, "communication": 1.0, "backward": 1.0, "optimizer": 3.0}
    assert watch.seconds() == [once, once]
    assert watch.seconds() == [NOTHING]


def test_stretches_within_communication_are_communication():
    watch = clock()
    with listening(watch), watch.step(), stage("loss"), stage("communication"), stage("communication"):
        pass
    assert watch.seconds() == [NOTHING | {"optimizer": 2.0, "loss": 2.0, "communication": 3.0}]


def test_a_stretch_ends_with_an_error_too():
    watch = clock()
    with listening(watch), pytest.raises(ValueError, match="of the step"), watch.step(), stage("forward"):
        raise ValueError("of the step")
    with stage("forward"):  # nobody listens
        pass
    assert watch.seconds() == [NOTHING | {"forward": 1.0, "optimizer": 2.0}]


def test_the_profiler_sees_stretches():
    with stage("before"):
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, stage("forward"):
        torch.ones(2) + 1
    names = {event.key for event in profiler.key_averages()}
    assert {"forward", "aten::add"} <= names
    assert "before" not in names


def test_calls_of_process_groups_are_named_meanwhile(tmp_path):
    before = {name: getattr(dist.ProcessGroup, name) for name in METHODS if hasattr(dist.ProcessGroup, name)}
    assert {"allreduce", "_allgather_base", "broadcast", "barrier"} <= before.keys()
    group = dist.ProcessGroupGloo(dist.FileStore(str(tmp_path / "store"), 1), 0, 1)
    watch = clock()
    with listening(watch), communication_named(), watch.step():
        group.allreduce([torch.ones(3)]).wait()
    assert watch.seconds()[0]["communication"] >= 1.0
    assert before == {name: getattr(dist.ProcessGroup, name) for name in before}
    with listening(watch), watch.step():
        group.allreduce([torch.ones(3)]).wait()
    assert watch.seconds()[0]["communication"] == 0.0
