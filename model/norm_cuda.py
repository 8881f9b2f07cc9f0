"""Batch norm over ranks on CUDA, by the kernels behind torch's SyncBatchNorm: one pass over the data a way.

Forward gathers each rank's (μ, 1/√(σ² + ε), n), 2C + 1 numbers, which one kernel then merges in Welford's way; backward
all-reduces 2C. Unlike SyncBatchNorm the host never waits for the device. What the backward needs of a forward, `Kept`,
is here μ, 1/√(σ² + ε) and the ranks' n, int32 [W].
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives
from model.norm_layout import Gradients, Kept, in_dtype, memory_format_of, statistics_dtype

# As a rank without rows counts itself: the merging kernel divides by the count of the ranks so far, which must not be
# 0. It truncates its running count to an integer, so that this adds nothing.
NO_ROWS = 1e-30


def laid_out(input: Tensor) -> Tensor:
    """The input as `forward` and `backward` take it."""
    return input.contiguous(memory_format=memory_format_of(input))


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
    channels = input.shape[1]
    if input.numel():
        mean, invstd = torch.batch_norm_stats(input, eps)
        own = torch.cat((mean, invstd, mean.new_full((1,), input.numel() // channels)))
    else:
        own = torch.ones(2 * channels + 1, dtype=statistics_dtype(input), device=input.device)
        own[:channels], own[-1] = 0, NO_ROWS
    of_ranks = collectives.all_gather_rows(own[None], group)  # [W, 2C + 1]
    means, invstds, counts = of_ranks[:, :channels], of_ranks[:, channels:-1], of_ranks[:, -1].contiguous()
    # The kernel takes its working dtype from the running statistics.
    merged_mean, merged_var = (
        own.new_zeros(channels) if running is None else running.to(own.dtype) for running in (running_mean, running_var)
    )
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        own, means, invstds, merged_mean, merged_var, momentum, eps, counts
    )
    for running, merged in ((running_mean, merged_mean), (running_var, merged_var)):
        if running is not None and running is not merged:
            running.copy_(merged)
    kept = mean, invstd, counts.int()
    if not input.numel():
        return torch.empty_like(input), kept
    weight, bias = in_dtype(mean.dtype, weight, bias)
    output: Tensor = torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)
    return output, kept


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    kept: Kept,
    *,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Gradients:
    """The gradients (ε is within `kept`). All ranks must call."""
    mean, invstd, counts = kept
    grad_output = grad_output.contiguous(memory_format=memory_format_of(input))
    channels = input.shape[1]
    if input.numel():
        own_dy, own_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            grad_output, input, mean, invstd, None, True, False, False
        )
    else:
        own_dy, own_dy_xmu = mean.new_zeros(2, channels)
    sums = collectives.all_reduce_sum_(torch.cat((own_dy, own_dy_xmu)), group)
    grad_input = torch.empty_like(input)
    if input.numel():
        (weight,) = in_dtype(mean.dtype, weight)
        grad_input = torch.batch_norm_backward_elemt(
            grad_output, input, mean, invstd, weight, sums[:channels], sums[channels:], counts
        )
    return grad_input, own_dy_xmu * invstd, own_dy
