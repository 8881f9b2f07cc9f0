"""What one step of LARS works on: stretches of memory, and what every backend does with them.

A stretch is a whole parameter, or, where an optimizer's state is shared out among ranks, the part of one that this rank
owns; several stretches may then belong to one tensor, on this rank or on others. The norms of LARS are those of whole
tensors: they are summed over stretches, and over ranks, between the two halves of a step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

Form = Literal["classic", "non_classic", "larc"]
FORMS: tuple[Form, ...] = get_args(Form)


class Options(NamedTuple):
    """Hyperparameters of a stretch."""

    lr: float | Tensor
    """A tensor is a float32 scalar on the stretch's device, for steps that a CUDA graph replays."""
    momentum: float
    weight_decay: float
    trust_coefficient: float
    adapt: bool
    """False: trust ratio 1."""
    form: Form
    nesterov: bool


class Stretches(NamedTuple):
    """Lists of one length. A stretch's three tensors have one shape, dtype and device, and the same dense strides."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    """Momentum; updated in place, as `params`. Gradients are read only."""
    tensors: list[int]
    """The number of the whole tensor to which each stretch belongs, ascending."""
    options: list[Options]
    num_tensors: int
    """Of whole tensors, those without a stretch here included."""


class Piece(NamedTuple):
    """Where a part of a parameter lies in a flat partition."""

    name: str
    """The parameter's."""
    tensor: int
    """Its number, the same on all ranks."""
    start: int
    """The first element, in the partition."""
    size: int


def norm_dtype(tensor: Tensor) -> torch.dtype:
    """What squared norms are kept in beside a stretch: float32 on a GPU, where float64 is slow; else float64."""
    return torch.float32 if tensor.is_cuda and tensor.dtype != torch.float64 else torch.float64


def strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's layout in memory: strides, but 0 for dimensions of one index, whose strides say nothing."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class Backend(Protocol):
    """A module that computes steps, on stretches of one device. Nothing here waits for it.

    `skip`, a bool scalar on the device, makes a step leave everything as it is where it is true.
    """

    def step(self, stretches: Stretches, skip: Tensor | None) -> None:
        """A whole step, where every tensor is one stretch."""

    def squared_norms(self, stretches: Stretches) -> Tensor:
        """The stretches' part of ‖p‖² and of ‖d‖² [num_tensors, 2], in `norm_dtype`.

        d is what the form measures against p: the decayed gradient (classic), the whole update (non_classic), or the
        gradient (larc). Rows of tensors that are not adapted may hold anything finite.
        """

    def update(self, stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
        """Change `params` and `buffers`, given the sums over all stretches and ranks."""
