"""What one step of LARS works on: stretches of memory, and what every backend does with them.

A stretch is a whole parameter, or, where an optimizer's state is shared out among ranks, the part of one that this rank
owns; several stretches may then belong to one tensor, on this rank or on others. The norms of LARS are those of whole
tensors: they are summed over stretches, and over ranks, between the two halves of a step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Form = Literal["classic", "non_classic", "larc"]


class Options(NamedTuple):
    """Hyperparameters of a stretch."""

    lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    adapt: bool
    """False: trust ratio 1."""
    form: Form
    nesterov: bool


class Stretches(NamedTuple):
    """Lists of one length; the three tensors of a stretch have one shape, dtype and device, and the same dense strides."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    """Momentum; updated in place, as `params`. Gradients are read only."""
    tensors: list[int]
    """The number of the whole tensor to which each stretch belongs, ascending."""
    options: list[Options]
    num_tensors: int
    """Of whole tensors, those without a stretch here included."""


class Backend(Protocol):
    """A module that computes steps. Nothing here waits for a device.

    `skip`, a bool scalar on the device, makes a step leave everything as it is where it is true.
    """

    def step(self, stretches: Stretches, skip: Tensor | None) -> None:
        """A whole step, where every tensor is one stretch."""

    def squared_norms(self, stretches: Stretches) -> Tensor:
        """The stretches' part of ‖p‖² and of ‖d‖² [num_tensors, 2], float64 on the CPU and float32 on a GPU.

        d is what the form measures against p: the decayed gradient (classic), the whole update (non_classic), or the
        gradient (larc). Rows of tensors that are not adapted may hold anything finite.
        """

    def update(self, stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
        """Change `params` and `buffers`, given the sums over all stretches and ranks."""
