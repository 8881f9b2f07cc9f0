"""Batch norm over ranks on any device: the formulas of `model.norm_functions` in torch.

One all-reduce of 2C + 1 numbers forward and one of 2C backward, in float64 so that Σx² − n·μ² is exact enough. What the
backward needs of a forward, `Kept`, is here μ, σ² and n, a float64 scalar.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model import collectives
from model.norm_layout import Gradients, Kept, in_dtype, statistics_dtype


def laid_out(input: Tensor) -> Tensor:
    """The input as `forward` and `backward` take it."""
    return input


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Kept]:
    """The output, and what `backward` needs; updates the running statistics in place. All ranks must call."""
    mean, var, count = _global_statistics(input, group)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    kept = mean, var, torch.tensor(count, dtype=torch.float64, device=input.device)
    return _normalise(input, mean, var, weight=weight, bias=bias, eps=eps), kept


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    kept: Kept,
    *,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Gradients:
    """The gradients. All ranks must call."""
    mean, var, count = kept
    grad_weight, grad_bias = _local_sums(grad_output, input, mean, var, eps)
    global_sums = collectives.all_reduce_sum_(torch.stack((grad_weight, grad_bias)).double(), group)
    mean_dy_xhat, mean_dy = (global_sums / count).to(mean.dtype)
    grad_input = _input_gradient(
        grad_output, input, mean, var, weight, mean_dy=mean_dy, mean_dy_xhat=mean_dy_xhat, eps=eps
    )
    return grad_input, grad_weight, grad_bias


def _global_statistics(input: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance [C] over all ranks (fp32, or fp64 for fp64 input), and the count."""
    channels = input.shape[1]
    mean, var = (statistic.double() for statistic in _local_statistics(input))
    own_count = input.numel() // channels
    sums = torch.cat((own_count * mean, own_count * (var + mean.square()), mean.new_full((1,), own_count)))
    collectives.all_reduce_sum_(sums, group)
    count = sums[-1].item()
    if count < 2:
        raise ValueError(
            f"batch norm needs at least 2 values of a channel over its {collectives.world_size(group)} ranks, "
            f"got {count:.0f}; shape {tuple(input.shape)} on rank {collectives.rank()}"
        )
    mean = sums[:channels] / count
    var = (sums[channels:-1] / count - mean.square()).clamp_min_(0)
    dtype = statistics_dtype(input)
    return mean.to(dtype), var.to(dtype), count


def _local_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    # torch.var_mean says the same, 30 times slower over a channels_last tensor on the CPU. The buffers that
    # this one could update (momentum 0: it does not) are given because they set the dtype of its result.
    unused = torch.zeros(input.shape[1], dtype=statistics_dtype(input), device=input.device)
    if not input.numel():
        return unused, unused
    mean, var = torch.batch_norm_update_stats(input, unused, unused.clone(), 0.0)
    return mean, var


def _local_sums(dy: Tensor, input: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Σ dy·x̂ and Σ dy [C] over this rank, by torch's backward of an evaluating batch norm (no dx wanted)."""
    if not input.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
        dy, input, None, mean, var, None, None, False, eps, (False, True, True)
    )
    return dy_xhat, dy_sum


def _input_gradient(
    dy: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    *,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    eps: float,
) -> Tensor:
    """The formula's dx."""
    if input.dtype == mean.dtype and input.stride(1) == 1 and dy.stride(1) == 1:
        # With channels innermost, a·dy + b·x + c in two vectorised passes.
        invstd = torch.rsqrt(var + eps)
        a = invstd if weight is None else invstd * weight
        b = -a * invstd * mean_dy_xhat
        a, b, c = (t.view(-1, *[1] * (input.dim() - 2)) for t in (a, b, -a * mean_dy - b * mean))
        return torch.addcmul(c, input, b).addcmul_(dy, a)
    # Else both of its terms as normalisations: γ(dy − mean(dy))/√(σ² + ε), and x̂ times γ·mean(dy·x̂)/√(σ² + ε).
    scale = mean_dy_xhat * torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    grad_input = _normalise(dy, mean_dy, var, weight=weight, bias=None, eps=eps)
    grad_input -= _normalise(input, mean, var, weight=scale, bias=None, eps=eps)
    return grad_input


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """γ(x − μ)/√(σ² + ε) + β in one pass over x; γ = 1, β = 0 where None."""
    weight, bias = in_dtype(mean.dtype, weight, bias)
    normalised: Tensor = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return normalised
