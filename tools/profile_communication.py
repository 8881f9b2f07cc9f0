"""Names what ranks tell each other in a training step: the stretch `communication`, whoever asks for it.

Gradients, the loss's projections and batch norm's statistics all go through torch's process groups, DeepSpeed's calls
included. Meanwhile the methods of these, and the wait for what they began, are stretches of `train.stages` for
whoever listens; nothing else changes. Where a rank waits for a later one, that counts as well. What CUDA graphs
replay cannot be seen: `train.compile: reduce-overhead` counts batch norm's exchanges as forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from train.stages import stage

COMMUNICATION = "communication"
METHODS = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "_allgather_base",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "_reduce_scatter_base",
    "broadcast",
    "alltoall",
    "alltoall_base",
    "send",
    "recv",
    "barrier",
    "gather",
    "scatter",
    "recv_anysource",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "gather_single",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
)
"""Of a process group; every collective of `torch.distributed` is one of them. Not each version of torch has all."""


@contextmanager
def communication_named() -> Iterator[None]:
    """Meanwhile, every call of a process group and every wait for one is the stretch `communication`."""
    places: list[tuple[Any, str]] = [(dist.ProcessGroup, name) for name in METHODS if name in vars(dist.ProcessGroup)]
    places.append((dist.Work, "wait"))
    # As the classes hold them: what `getattr` gives of a compiled method is no method any more.
    before = [(owner, name, vars(owner)[name]) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, _named(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        with stage(COMMUNICATION):
            return method(*args, **options)

    return call
