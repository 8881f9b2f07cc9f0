"""Whole parameters in the flat partitions that DeepSpeed's ZeRO makes of them.

Stages 1 and 2 lay the parameters of an optimizer's group end to end in one flat tensor, padded at its end, and cut it
into as many partitions of one size as there are ranks. Each rank's optimizer then sees one parameter a group: its
partition, a float32 master copy. A border may run through a parameter, and a partition may hold nothing but padding.
Here the parameters are found again: where LARS needs the norm of a whole one, and where a checkpoint wants the
optimizer's state under the parameters' names, whatever the number of ranks that wrote it or reads it.

DeepSpeed's optimizer is an argument here; what is read are the tables of its runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from model.collectives import all_gather_rows
from train.cli import UnfitEnvironment
from train.optim.lars import LARS
from train.optim.stretches import Piece

DEEPSPEED_VERSION = "0.19.8"  # where these tables were found and tested
TABLES = (
    "bit16_groups",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "partition_size",
    "single_partition_of_fp32_groups",
    "real_dp_process_group",
    "averaged_gradients",
)


class Place(NamedTuple):
    """Where a parameter lies in the flat tensor of its group."""

    param: Tensor
    """The module's own, a view of the flat tensor."""
    begin: int
    """Of its first element."""

    @property
    def end(self) -> int:
        """Behind its last element."""
        return self.begin + self.param.numel()


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """One parameter group under ZeRO, as this rank sees it."""

    partition: Tensor
    """This rank's, float32, of one dimension: what the optimizer holds in place of the group's parameters."""
    begin: int
    """Of the partition in the flat tensor."""
    places: dict[str, Place]
    """By parameter name, in the order of the flat tensor."""
    process_group: dist.ProcessGroup
    """The ranks that share the flat tensor out, in the order of their partitions."""

    def overlap(self, place: Place) -> tuple[int, int]:
        """Begin and end, in the flat tensor, of what this rank owns of a parameter; equal where that is nothing."""
        end = self.begin + self.partition.numel()
        first = min(max(place.begin, self.begin), end)
        return first, max(first, min(place.end, end))


def flat_groups(zero_optimizer: Any) -> list[FlatGroup]:
    """Read the tables of DeepSpeed's optimizer of stage 1 or 2, whose groups carry `param_names`.

    Raises:
        UnfitEnvironment: they are not there, or do not lead to the parameters' values, as with another DeepSpeed.
    """
    missing = [name for name in TABLES if not hasattr(zero_optimizer, name)]
    if missing:
        raise _other_deepspeed(f"keep no `{missing[0]}`")
    groups = [
        _flat_group(zero_optimizer, index, group["param_names"])
        for index, group in enumerate(zero_optimizer.optimizer.param_groups)
    ]
    for group in groups:
        for name, place in group.places.items():
            first, end = group.overlap(place)
            ours = place.param.detach().flatten()[first - place.begin : end - place.begin]
            if not torch.equal(ours, group.partition.detach()[first - group.begin : end - group.begin]):
                raise _other_deepspeed(f"do not hold `{name}` where they should")
    return groups


def partition_lars(optimizer: LARS, groups: list[FlatGroup]) -> None:
    """Tell LARS which stretches of its flat partitions belong to which parameter."""
    pieces: dict[Tensor, list[Piece]] = {}
    num_tensors = 0
    for group in groups:
        pieces[group.partition] = []
        for name, place in group.places.items():
            first, end = group.overlap(place)
            if end > first:
                pieces[group.partition].append(Piece(name, num_tensors, first - group.begin, end - first))
            num_tensors += 1
    optimizer.partition(pieces, num_tensors, groups[0].process_group)


def partition_gradients(zero_optimizer: Any) -> list[Tensor]:
    """The reduced gradients that this rank's next step takes, after the last backward before it."""
    groups = [grads for grads in zero_optimizer.averaged_gradients.values() if grads is not None]
    return [grad for grads in groups for grad in ([grads] if isinstance(grads, Tensor) else grads)]


def gather_state(optimizer: Optimizer, groups: list[FlatGroup]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state as `{parameter name: {slot: whole tensor}}`, the same on all ranks. All ranks must call.

    One all-gather a group and slot; the tensors are views of what it gave, on the device. The state must consist of
    tensors of the parameters' shapes. Before the first step there is none.
    """
    named: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        state = optimizer.state.get(group.partition, {})
        for slot in _slots(state, group.process_group):
            if slot not in state:  # on a rank that owns but padding, and has stepped nothing
                state = {slot: torch.zeros_like(group.partition)}
            flat = all_gather_rows(state[slot], group.process_group)
            for name, place in group.places.items():
                named.setdefault(name, {})[slot] = flat[place.begin : place.end].view(place.param.shape)
    return named


def scatter_state(optimizer: Optimizer, groups: list[FlatGroup], saved: dict[str, dict[str, Tensor]]) -> None:
    """Replace the optimizer's state by this rank's share of `saved`, which is what `gather_state` gives.

    A parameter that is absent in `saved` starts from zeros.

    Raises:
        ValueError: `saved` names a parameter that is not there, or has a tensor of another shape; nothing is
            changed then.
    """
    places = {name: place for group in groups for name, place in group.places.items()}
    for name, slots in saved.items():
        if name not in places:
            raise ValueError(
                f"optimizer state `{name}` belongs to no parameter here; resume with the model that saved it"
            )
        for slot, tensor in slots.items():
            if tensor.shape != places[name].param.shape:
                raise ValueError(
                    f"optimizer state `{name}.{slot}` must have shape {list(places[name].param.shape)}, "
                    f"got {list(tensor.shape)}; resume with the model that saved it"
                )
    optimizer.state.clear()
    for group in groups:
        for name, place in group.places.items():
            first, end = group.overlap(place)
            for slot, tensor in saved.get(name, {}).items():
                state = optimizer.state[group.partition]
                if slot not in state:
                    state[slot] = torch.zeros_like(group.partition)
                ours = tensor.flatten()[first - place.begin : end - place.begin]
                state[slot][first - group.begin : end - group.begin].copy_(ours)


def _flat_group(zero_optimizer: Any, index: int, names: list[str]) -> FlatGroup:
    by_param = dict(zip(zero_optimizer.bit16_groups[index], names, strict=True))
    process_group = zero_optimizer.real_dp_process_group[index]
    params, offsets = zero_optimizer.round_robin_bit16_groups[index], zero_optimizer.round_robin_bit16_offsets[index]
    return FlatGroup(
        partition=zero_optimizer.single_partition_of_fp32_groups[index],
        begin=dist.get_rank(process_group) * zero_optimizer.partition_size[index],
        places={by_param[param]: Place(param, begin) for param, begin in zip(params, offsets, strict=True)},
        process_group=process_group,
    )


def _other_deepspeed(what: str) -> UnfitEnvironment:
    return UnfitEnvironment(
        f"DeepSpeed's flat partitions {what}, unlike those of version {DEEPSPEED_VERSION}; "
        "install that version, or set `train.zero_stage` to 0"
    )


def _slots(state: dict[str, Any], process_group: dist.ProcessGroup) -> list[str]:
    """The names that the group's first rank keeps state under: it owns the beginning of every flat tensor."""
    slots = [sorted(slot for slot, value in state.items() if isinstance(value, Tensor))]
    dist.broadcast_object_list(slots, group=process_group, group_src=0)
    return slots[0]
