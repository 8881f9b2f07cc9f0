"""Batch norm over ranks as torch operators, `torch.ops.twinview.batch_norm*`, which `torch.compile` takes as they are.

Its collectives cannot be traced; an operator that says what its results look like need not be, and leaves the graph
whole. An operator with a gradient may change none of its arguments, so here the running statistics are updated around
it. All ranks must compile the same graph: independent collectives then stay in one order on all of them.

Eager calls go through `model.norm_functions`, with less to do around each.

Shapes: C channels, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from model import collectives, norm_cuda
from model.norm_functions import way_for
from model.norm_layout import memory_format_of, statistics_dtype


def batch_norm_over_ranks(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """See `model.norm_functions.batch_norm_over_ranks`."""
    name = "" if group is None else group.group_name
    output: Tensor
    output, mean, var, *_ = batch_norm(input, weight, bias, eps, name)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_(var.detach().to(running_var.dtype), momentum)
    return output


@torch.library.custom_op(
    "twinview::batch_norm",
    mutates_args=(),
    schema=(
        "(Tensor input, Tensor? weight, Tensor? bias, float eps, str group) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the mean and unbiased variance of the group's batch [C], and what the backward needs."""
    input = _laid_out(input)
    # A momentum of 1 makes running statistics those of the batch.
    mean, var = (torch.zeros(input.shape[1], dtype=statistics_dtype(input), device=input.device) for _ in range(2))
    output, (kept_mean, spread, counts) = way_for(input).forward(
        input, weight, bias, mean, var, momentum=1.0, eps=eps, group=_group(group)
    )
    return output, mean, var, kept_mean, spread, counts


@batch_norm.register_fake
def _(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var, kept_mean, spread = (
        torch.empty(input.shape[1], dtype=statistics_dtype(input), device=input.device) for _ in range(4)
    )
    on_cuda = way_for(input) is norm_cuda
    shape, dtype = ((collectives.world_size(_group(group)),), torch.int32) if on_cuda else ((), torch.float64)
    counts = torch.empty(shape, dtype=dtype, device=input.device)
    return _like(input), mean, var, kept_mean, spread, counts


@torch.library.custom_op(
    "twinview::batch_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor spread, Tensor counts, float eps, "
        "str group) -> (Tensor, Tensor, Tensor)"
    ),
)
def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    counts: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, γ and β."""
    input = _laid_out(input)
    grad_output = grad_output.contiguous(memory_format=memory_format_of(input))
    grad_input, grad_weight, grad_bias = way_for(input).backward(
        grad_output, input, weight, (mean, spread, counts), eps=eps, group=_group(group)
    )
    return grad_input, grad_weight, grad_bias


@batch_norm_backward.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    counts: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(input), torch.empty_like(mean), torch.empty_like(mean)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, _, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(input, weight, *output[3:])


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_input, grad_weight, grad_bias = batch_norm_backward(grad_output, *ctx.saved_tensors, ctx.eps, ctx.group)
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return grad_input, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None


batch_norm.register_autograd(_backward, setup_context=_keep)


def _group(name: str) -> dist.ProcessGroup | None:
    # As torch's own collectives find their groups in compiled code.
    return c10d._resolve_process_group(c10d.GroupName(name)) if name else None  # type: ignore[attr-defined]


def _laid_out(input: Tensor) -> Tensor:
    return input.contiguous(memory_format=memory_format_of(input))


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format_of(input))
