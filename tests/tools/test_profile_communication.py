"""What ranks tell each other is named while that is asked for; before and after, process groups are torch's own."""

import inspect
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tools.profile_communication import METHODS, communication_named
from tools.profile_step import StepClock
from train.stages import listening

CALLS = re.compile(
    r"\b(?:group|pg)\.(_?\w*(?:reduce|gather|scatter|alltoall|all_to_all|broadcast|barrier|send|recv)\w*)\("
)


@pytest.fixture
def group(tmp_path):
    """A process group of one rank, which is no other test's."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    made = dist.ProcessGroup(store, 0, 1)
    made._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, dist.ProcessGroupGloo(store, 0, 1))
    return made


def seconds_of(call):
    """Of communication in a call, each look at the clock being a second."""
    watch = StepClock(torch.device("cpu"), itertools.count(0.0).__next__)
    with listening(watch), watch.step():
        call()
    return watch.seconds()[0]["communication"]


def test_collectives_work_after_they_were_named(group):
    values = torch.tensor([2.0, 3.0])

    def reduce():
        group.allreduce([values]).wait()
        group.barrier().wait()

    assert seconds_of(reduce) == 0.0
    with communication_named():
        with communication_named():
            assert seconds_of(reduce) > 0.0
        assert seconds_of(reduce) > 0.0
    assert seconds_of(reduce) == 0.0
    assert values.tolist() == [2.0, 3.0]


def test_a_call_counts_without_a_wait(group):
    with communication_named():
        work = []
        assert seconds_of(lambda: work.append(group.allreduce([torch.ones(2)]))) > 0.0
    work[0].wait()


def test_every_collective_of_torch_is_named():
    calls = set(CALLS.findall(inspect.getsource(distributed_c10d)))
    assert {"allreduce", "broadcast", "barrier"} <= calls
    assert calls - {"monitored_barrier"} <= set(METHODS)
