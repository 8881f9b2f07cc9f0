"""Batch norm over the global batch: the statistics of all ranks' rows, on any backend and device.

SimCLR (section 2.2) aggregates mean and variance over all devices, since with local statistics the network
could tell positives from negatives by the device they share. W ranks compute what one would, to rounding; the
formulas are in `model.norm_functions`.

- The layers are torch's: same parameters, buffers, options and `state_dict` keys. One rank alone runs torch's
  own code, and so does evaluation, which uses the running statistics and communicates nothing.
- `convert` turns the batch norms of any model into these.
- `groups_of` and `set_group` restrict the statistics to groups of ranks, where the batch of all of them is more
  than the method needs and communication costs.

Shapes: N local rows, C channels, L, H × W or D × H × W positions.
"""

import copy
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import collectives, norm_functions, norm_ops

Model = TypeVar("Model", bound=nn.Module)


class GlobalBatchNorm(_BatchNorm):
    """Torch's batch norm with statistics over all ranks, for [N, C] with any positions after (as SyncBatchNorm).

    In training all ranks of `group` must call forward, and backward, together and in one order. They may hold
    different numbers of rows; none at all is borne too, so long as the group holds two values of a channel. The
    running variance is the unbiased one of the group's batch, as torch's. `momentum=None`, torch's cumulative
    average, makes the host wait for a GPU, as in torch (and breaks the graph under `torch.compile`).

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: weight of the newest batch in the running statistics (torch's convention: 1 − decay).
        affine: learn γ (scale), and β unless `bias` is false.
        track_running_stats: keep running statistics; else evaluation uses those of its own local batch.
        bias: learn β (offset) beside γ.
    """

    SHAPES: ClassVar[dict[int, str]] = {2: "[N, C]", 3: "[N, C, L]", 4: "[N, C, H, W]", 5: "[N, C, D, H, W]"}
    """What an input of so many dimensions is; others are refused."""

    group: dist.ProcessGroup | None = None
    """The ranks whose rows make the statistics (default: all). Set it by `set_group`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if not bias:  # torch's own `bias` argument is newer than the oldest torch supported
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, fresh running statistics; older versions of torch take β for granted here."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GlobalBatchNorm":
        """A copy (a moving average's, say) belongs to the same group of ranks, which itself cannot be copied."""
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] of a floating dtype → the same shape, dtype and memory format.

        Raises:
            ValueError: the input's shape or dtype does not fit, or a group of CPU ranks holds fewer than two
                values of a channel (raised on all of its ranks).
        """
        if not self.training or collectives.world_size(self.group) == 1:
            output: Tensor = super().forward(input)
        else:
            self._check_input_dim(input)
            output = self._over_ranks(input)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        fits = input.dim() in self.SHAPES and input.shape[1] == self.num_features and input.is_floating_point()
        if not fits:
            shapes = " or ".join(self.SHAPES.values())
            raise ValueError(
                f"{type(self).__name__} takes {shapes} with C = {self.num_features}, of a floating dtype, "
                f"got shape {tuple(input.shape)} of {input.dtype}"
            )

    def _over_ranks(self, input: Tensor) -> Tensor:
        weight_of_batch = 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            weight_of_batch = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        way = norm_ops if torch.compiler.is_compiling() else norm_functions
        output: Tensor = way.batch_norm_over_ranks(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            momentum=weight_of_batch,
            eps=self.eps,
            group=self.group,
        )
        return output


class GlobalBatchNorm1d(GlobalBatchNorm):
    """`GlobalBatchNorm` of [N, C] or [N, C, L]."""

    SHAPES: ClassVar = {dim: GlobalBatchNorm.SHAPES[dim] for dim in (2, 3)}


class GlobalBatchNorm2d(GlobalBatchNorm):
    """`GlobalBatchNorm` of [N, C, H, W]."""

    SHAPES: ClassVar = {4: GlobalBatchNorm.SHAPES[4]}


class GlobalBatchNorm3d(GlobalBatchNorm):
    """`GlobalBatchNorm` of [N, C, D, H, W]."""

    SHAPES: ClassVar = {5: GlobalBatchNorm.SHAPES[5]}


OURS = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
    nn.BatchNorm3d: GlobalBatchNorm3d,
    nn.SyncBatchNorm: GlobalBatchNorm,
}


def convert(model: Model) -> Model:
    """Make every batch norm of torch in `model`, or `model` itself, one over the global batch.

    In place: a layer stays the object that it is, with its parameters, buffers, options, mode and hooks (so that
    optimizers and checkpoints need not know); only its class changes. A SyncBatchNorm keeps its process group.

    Returns:
        `model`.

    Raises:
        ValueError: a batch norm of another class, whose forward may do something else; nothing is changed then.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in found:
        if type(module) not in OURS and not isinstance(module, GlobalBatchNorm):
            raise ValueError(
                f"`{name or 'model'}` must be one of torch's {', '.join(cls.__name__ for cls in OURS)} to be "
                f"converted, got {type(module).__name__}; replace it by one first (a lazy one by running it once)"
            )
    for _, module in found:
        if isinstance(module, nn.SyncBatchNorm):
            module.group = module.__dict__.pop("process_group")
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
    return model


def set_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Take the statistics of every `GlobalBatchNorm` in `model` over `group` alone (None: over all ranks).

    Raises:
        ValueError: `model` holds no such layer, or this rank is not in `group`.
    """
    if group is not None and collectives.rank(group) < 0:
        raise ValueError(f"rank {collectives.rank()} is not in the group that its batch norms should use")
    norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    if not norms:
        raise ValueError(f"{type(model).__name__} holds no global batch norm; use convert(model) first")
    for norm in norms:
        norm.group = group


def groups_of(size: int, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Divide all ranks into groups of `size` consecutive ones; returns the group that holds this rank.

    All ranks must call. None stands for all ranks: where `size` is 0 or the world size. `timeout` is how long they wait
    for one another; None: torch's default, whatever that of all ranks is.

    Raises:
        ValueError: `size` does not divide the world size.
    """
    world_size = collectives.world_size()
    check_group_size(size, world_size)
    if size in (0, world_size):
        return None
    own, _ = dist.new_subgroups(size, timeout=timeout)
    return own


def check_group_size(size: int, world_size: int) -> None:
    """Refuse a group size that is neither 0 (all ranks) nor a divisor of the world size.

    Raises:
        ValueError: as said; names the nearest sizes that would do.
    """
    if size == 0 or (size > 0 and world_size % size == 0):
        return
    divisors = [divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]
    nearest = sorted({*[d for d in divisors if d < size][-1:], *[d for d in divisors if d > size][:1]})
    raise ValueError(
        f"`model.norm_group_size` must divide the world size {world_size}, got {size}; "
        f"use {' or '.join(map(str, nearest))}, or 0 for all ranks"
    )
