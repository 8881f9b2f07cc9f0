"""What global batch norm computes, forward and backward, and what its ranks tell each other.

    n, μ, σ²  = count, mean and (biased) variance over all ranks and positions of a channel
    y  = γ·x̂ + β,   x̂ = (x − μ)/√(σ² + ε)
    dx = γ/√(σ² + ε) · (dy − mean(dy) − x̂·mean(dy·x̂))        means over all ranks and positions
    dγ = Σ dy·x̂,  dβ = Σ dy        over this rank's rows: data-parallel averaging adds up the ranks' parts

(Ioffe and Szegedy 2015, with the sums taken over ranks.) There are two ways to compute it: `model.norm_anywhere` and
`model.norm_cuda`.

Shapes: N local rows, C channels, W ranks; statistics are [C].
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import norm_anywhere, norm_cuda


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
    """Normalise [N, C, …] by the statistics of all rows in `group`; updates the running statistics in place.

    Every rank of the group must call, and afterwards run backward. Running statistics are both given or both None.

    Raises:
        ValueError: fewer than two values of a channel on all ranks together (not known on CUDA, where the running
            variance then is not finite).
    """
    output: Tensor = _OverRanks.apply(input, weight, bias, running_mean, running_var, momentum, eps, group)
    return output


def way_for(input: Tensor) -> ModuleType:
    """The module that computes it, which has `laid_out`, `forward` and `backward`."""
    return norm_cuda if input.is_cuda else norm_anywhere


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        way = way_for(input)
        input = way.laid_out(input)
        output: Tensor
        output, kept = way.forward(
            input, weight, bias, running_mean, running_var, momentum=momentum, eps=eps, group=group
        )
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(input, weight, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, *kept = ctx.saved_tensors
        gradients = way_for(input).backward(grad_output, input, weight, kept, eps=ctx.eps, group=ctx.group)
        needed = zip(gradients, (True, *ctx.needs_input_grad[1:3]), strict=True)
        return *(gradient if is_needed else None for gradient, is_needed in needed), *(None,) * 5
