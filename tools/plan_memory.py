"""Memory of a rank: the model's states by ZeRO stage, activations, and what is held beside them.

    states, bytes        stage 0: 12 P      stage 1: (8 + 8/n) P      stage 2: (4 + 12/n) P
                         parameters, gradients and momentum in float32; stages 1 and 2 hold the optimizer's own copy of
                         the parameters too, and share it and the momentum out, 2 also the gradients
    while it computes    activations · images in the network + projections of all ranks; bf16: 2 P of cast weights
    while it reduces     a copy of the gradients that are on their way: all 4 P at stage 0, a bucket at 1 and 2
    peak                 states + the larger of the two + what does not depend on the plan

The last is what the profile's peak shows beyond the rest; without a measured peak it is assumed. (Rajbhandari et al.
2020, "ZeRO", section 3, for Adam; LARS has one moment.)

Shapes: P parameters, n ranks, b images of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.plan_counts import Counts
from train.engine import BUCKET_ELEMENTS

FLOAT32 = 4
ASSUMED_REST = {"cuda": 1.5e9, "cpu": 1.0e9}  # context, libraries and their workspaces; or an interpreter with torch
COPIES_OF_ROWS = 3  # projections of all ranks, their scaled form, and a gradient of as many at most


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank."""

    states: float
    """Parameters, gradients, momentum, copies and averages of them."""
    computing: float
    """Activations and what goes with them."""
    reducing: float
    """The copy of gradients on their way."""
    rest: float
    """What no plan changes."""

    @property
    def peak(self) -> float:
        """At most held at once."""
        return self.states + max(self.computing, self.reducing) + self.rest


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Of one configuration."""

    counts: Counts
    zero_stage: int
    bf16: bool
    ema: bool
    """Whether an average of the weights is kept."""
    micro_batch_size: int | None
    """Images in the network at a time; None: all."""
    activation_scale: float = 1.0
    """Measured bytes of activations, as a multiple of the counted ones."""
    rest: float = 0.0

    def at(self, ranks: int, local_batch_size: float) -> Memory:
        """With so many ranks and images on each."""
        parameters = self.counts.parameters
        in_network = min(self.micro_batch_size or local_batch_size, local_batch_size)
        reducing = 0 if ranks == 1 else FLOAT32 * parameters
        if self.zero_stage:
            reducing = FLOAT32 * min(parameters, BUCKET_ELEMENTS)
        return Memory(
            states=state_bytes(parameters, self.zero_stage, ranks) + FLOAT32 * parameters * self.ema,
            computing=self.per_image * in_network
            + self.per_row * ranks * local_batch_size
            + 2 * parameters * self.bf16,
            reducing=reducing,
            rest=self.rest,
        )

    @property
    def per_image(self) -> float:
        """Bytes of activations of an image in the network."""
        counted = self.counts.activation_bytes_per_image + self.counts.recomputed_bytes_per_image
        return self.activation_scale * counted

    @property
    def per_row(self) -> float:
        """Bytes that every rank holds for each image of the global batch, in the loss."""
        return float(COPIES_OF_ROWS * FLOAT32 * self.counts.num_views * self.counts.out_dim)

    def largest_local_batch(self, ranks: int, num_bytes: float) -> int:
        """The most images of a rank that fit into so many bytes; 0: not one."""
        if self.micro_batch_size is not None:
            none = self.at(ranks, 0)
            free = num_bytes - none.states - none.rest - none.computing - self.per_image * self.micro_batch_size
            return max(int(free // (self.per_row * ranks)), 0)
        none = self.at(ranks, 0)
        if num_bytes < none.peak:
            return 0
        free = num_bytes - none.states - none.rest - none.computing
        return max(int(free // (self.per_image + self.per_row * ranks)), 0)


def state_bytes(parameters: int, zero_stage: int, ranks: int) -> float:
    """Bytes of parameters, gradients and momentum on a rank, and of ZeRO's copy of its share of the parameters."""
    whole, shared = {0: (12, 0), 1: (8, 8), 2: (4, 12)}[zero_stage]
    return (whole + shared / ranks) * parameters
