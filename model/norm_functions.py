"""What global batch norm computes, forward and backward, and what its ranks tell each other.

    n, μ, σ²  = count, mean and (biased) variance over all ranks and positions of a channel
    y  = γ·x̂ + β,   x̂ = (x − μ)/√(σ² + ε)
    dx = γ/√(σ² + ε) · (dy − mean(dy) − x̂·mean(dy·x̂))        means over all ranks and positions
    dγ = Σ dy·x̂,  dβ = Σ dy        over this rank's rows: data-parallel averaging adds up the ranks' parts

(Ioffe and Szegedy 2015, with the sums taken over ranks.) Two ways to compute it:

- anywhere: one all-reduce of 2C + 1 numbers forward and one of 2C backward, in float64 so that Σx² − n·μ² is
  exact enough;
- on CUDA: the kernels behind torch's SyncBatchNorm, one pass over the data where the other needs several. Forward
  gathers each rank's (μ, 1/√(σ² + ε), n), 2C + 1 numbers, which one kernel then merges in Welford's way; backward
  all-reduces 2C. Unlike SyncBatchNorm the host never waits for the device.

Shapes: N local rows, C channels, W ranks; statistics are [C].
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import collectives

# As a rank without rows counts itself on CUDA: the merging kernel divides by the count of the ranks so far, which
# must not be 0. It truncates its running count to an integer, so that this adds nothing.
NO_ROWS = 1e-30

Gradients = tuple[Tensor, Tensor | None, Tensor | None, None, None, None, None, None]


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
    function = _OnCuda if input.is_cuda else _Anywhere
    output: Tensor = function.apply(input, weight, bias, running_mean, running_var, momentum, eps, group)
    return output


class _Anywhere(torch.autograd.Function):
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
        mean, var, count = _global_statistics(input, group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        ctx.save_for_backward(input, weight, mean, var)
        return _normalise(input, mean, var, weight=weight, bias=bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        input, weight, mean, var = ctx.saved_tensors
        grad_weight, grad_bias = _local_sums(grad_output, input, mean, var, ctx.eps)
        global_sums = collectives.all_reduce_sum_(torch.stack((grad_weight, grad_bias)).double(), ctx.group)
        mean_dy_xhat, mean_dy = (global_sums / ctx.count).to(mean.dtype)
        grad_input = _input_gradient(
            grad_output, input, mean, var, weight, mean_dy=mean_dy, mean_dy_xhat=mean_dy_xhat, eps=ctx.eps
        )
        return _gradients(ctx, grad_input, grad_weight, grad_bias)


class _OnCuda(torch.autograd.Function):
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
        input = input.contiguous(memory_format=_memory_format(input))
        channels = input.shape[1]
        if input.numel():
            mean, invstd = torch.batch_norm_stats(input, eps)
            own = torch.cat((mean, invstd, mean.new_full((1,), input.numel() // channels)))
        else:
            own = torch.ones(2 * channels + 1, dtype=_statistics_dtype(input), device=input.device)
            own[:channels], own[-1] = 0, NO_ROWS
        of_ranks = collectives.all_gather_rows(own[None], group)  # [W, 2C + 1]
        means, invstds, counts = of_ranks[:, :channels], of_ranks[:, channels:-1], of_ranks[:, -1].contiguous()
        # The kernel takes its working dtype from the running statistics.
        merged_mean, merged_var = (
            own.new_zeros(channels) if running is None else running.to(own.dtype)
            for running in (running_mean, running_var)
        )
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            own, means, invstds, merged_mean, merged_var, momentum, eps, counts
        )
        for running, merged in ((running_mean, merged_mean), (running_var, merged_var)):
            if running is not None and running is not merged:
                running.copy_(merged)
        ctx.group = group
        ctx.save_for_backward(input, weight, mean, invstd, counts.int())
        if not input.numel():
            return torch.empty_like(input)
        weight, bias = _in_dtype(mean.dtype, weight, bias)
        output: Tensor = torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        input, weight, mean, invstd, counts = ctx.saved_tensors
        grad_output = grad_output.contiguous(memory_format=_memory_format(input))
        channels = input.shape[1]
        if input.numel():
            own_dy, own_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
                grad_output, input, mean, invstd, None, True, False, False
            )
        else:
            own_dy, own_dy_xmu = mean.new_zeros(2, channels)
        sums = collectives.all_reduce_sum_(torch.cat((own_dy, own_dy_xmu)), ctx.group)
        grad_input = torch.empty_like(input)
        if input.numel():
            (weight,) = _in_dtype(mean.dtype, weight)
            grad_input = torch.batch_norm_backward_elemt(
                grad_output, input, mean, invstd, weight, sums[:channels], sums[channels:], counts
            )
        return _gradients(ctx, grad_input, own_dy_xmu * invstd, own_dy)


def _gradients(ctx: Any, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> Gradients:
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    of_parameters = grad_weight if needs_weight else None, grad_bias if needs_bias else None
    return grad_input, *of_parameters, None, None, None, None, None


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
    dtype = _statistics_dtype(input)
    return mean.to(dtype), var.to(dtype), count


def _local_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    # torch.var_mean says the same, 30 times slower over a channels_last tensor on the CPU. The buffers that
    # this one could update (momentum 0: it does not) are given because they set the dtype of its result.
    unused = torch.zeros(input.shape[1], dtype=_statistics_dtype(input), device=input.device)
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
    weight, bias = _in_dtype(mean.dtype, weight, bias)
    normalised: Tensor = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return normalised


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _memory_format(x: Tensor) -> torch.memory_format:
    """The dense format that the CUDA kernels read fastest from `x`."""
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format
