"""Batch norm over the global batch: the statistics of all ranks' rows, on any backend and device.

SimCLR (section 2.2) aggregates mean and variance over all devices, since with local statistics the network
could tell positives from negatives by the device they share. W ranks compute what one would, to rounding:

    n, μ, σ²  = count, mean and (biased) variance over all ranks and positions of a channel
    y  = γ·x̂ + β,   x̂ = (x − μ)/√(σ² + ε)
    dx = γ/√(σ² + ε) · (dy − mean(dy) − x̂·mean(dy·x̂))        means over all ranks and positions
    dγ = Σ dy·x̂,  dβ = Σ dy        over this rank's rows: data-parallel averaging adds up the ranks' parts

Forward and backward take one all-reduce each (2C + 1 and 2C numbers, in float64 so that Σx² − n·μ² is exact
enough). Ranks may hold different numbers of rows, each at least one.

Shapes: N local rows, C channels, H × W positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import collectives


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Torch's batch norm (same parameters, buffers and state_dict keys) with statistics over all ranks.

    In training all ranks must call forward, and backward, together. One rank alone takes `F.batch_norm`'s
    path, and so does evaluation, which uses the running statistics and communicates nothing. The running
    variance is the unbiased one of the global batch, as torch's.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: weight of the newest batch in the running statistics (torch's convention: 1 − decay).
        affine: learn γ (scale), and β unless `bias` is false.
        bias: learn β (offset) beside γ.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        if not bias:  # torch's own `bias` argument is newer than the oldest torch supported
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, fresh running statistics; older versions of torch take β for granted here."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _check_input_dim(self, input: Tensor) -> None:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """[N, C] or [N, C, H, W], fp32, bf16, fp16 or fp64 → the same shape, dtype and memory format."""
        self._check_input_dim(input)
        if self.training:
            self.num_batches_tracked.add_(1)
        if not self.training or collectives.world_size() == 1:
            return self._torch_batch_norm(input)
        if not input.numel():
            raise ValueError(
                f"batch norm needs at least one row on every rank, got shape {tuple(input.shape)} "
                f"on rank {collectives.rank()}"
            )
        output: Tensor
        output, mean, unbiased_var = _GlobalBatchNormFunction.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)
        return output

    def _torch_batch_norm(self, input: Tensor) -> Tensor:
        output: Tensor = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return output


class GlobalBatchNorm1d(_GlobalBatchNorm):
    """`_GlobalBatchNorm` of [N, C]."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2:
            raise ValueError(f"GlobalBatchNorm1d takes [N, C], got shape {tuple(input.shape)}")


class GlobalBatchNorm2d(_GlobalBatchNorm):
    """`_GlobalBatchNorm` of [N, C, H, W]."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"GlobalBatchNorm2d takes [N, C, H, W], got shape {tuple(input.shape)}")


class _GlobalBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, count = _global_statistics(input)
        ctx.eps = eps
        ctx.save_for_backward(input, weight, mean, var, count)
        unbiased_var = var * (count / (count - 1))  # count ≥ W ≥ 2
        ctx.mark_non_differentiable(mean, unbiased_var)
        return _normalise(input, mean, var, weight=weight, bias=bias, eps=eps), mean, unbiased_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight, mean, var, count = ctx.saved_tensors
        grad_weight, grad_bias = _local_sums(grad_output, input, mean, var, ctx.eps)
        global_sums = collectives.all_reduce_sum_(torch.stack((grad_weight, grad_bias)).double())
        mean_dy_xhat, mean_dy = (global_sums / count).to(mean.dtype)
        # Both terms of dx are normalisations: γ(dy − mean(dy))/√(σ² + ε), and x̂ times γ·mean(dy·x̂)/√(σ² + ε).
        scale = mean_dy_xhat * torch.rsqrt(var + ctx.eps)
        if weight is not None:
            scale = scale * weight
        grad_input = _normalise(grad_output, mean_dy, var, weight=weight, bias=None, eps=ctx.eps)
        grad_input -= _normalise(input, mean, var, weight=scale, bias=None, eps=ctx.eps)
        return (
            grad_input,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _global_statistics(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] over all ranks (fp32, or fp64 for fp64 input), and the count, a tensor."""
    mean, var = _local_statistics(input)
    mean, var = mean.double(), var.double()
    count = mean.new_full((1,), input.numel() // input.shape[1])
    sums = torch.cat((count * mean, count * (var + mean.square()), count))
    collectives.all_reduce_sum_(sums)
    channels = input.shape[1]
    count = sums[-1]
    mean = sums[:channels] / count
    var = (sums[channels:-1] / count - mean.square()).clamp_min_(0)
    dtype = _statistics_dtype(input)
    return mean.to(dtype), var.to(dtype), count


def _local_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    # torch.var_mean says the same, 30 times slower over a channels_last tensor on the CPU. The buffers that
    # this one could update (momentum 0: it does not) are given because they set the dtype of its result.
    unused = torch.zeros(input.shape[1], dtype=_statistics_dtype(input), device=input.device)
    mean, var = torch.batch_norm_update_stats(input, unused, unused.clone(), 0.0)
    return mean, var


def _local_sums(dy: Tensor, input: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Σ dy·x̂ and Σ dy [C] over this rank, by torch's backward of an evaluating batch norm (no dx wanted)."""
    _, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
        dy, input, None, mean, var, None, None, False, eps, (False, True, True)
    )
    return dy_xhat, dy_sum


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """γ(x − μ)/√(σ² + ε) + β in one pass over x; γ = 1, β = 0 where None."""
    weight = None if weight is None else weight.to(mean.dtype)
    bias = None if bias is None else bias.to(mean.dtype)
    normalised: Tensor = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return normalised


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
