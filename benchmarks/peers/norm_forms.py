"""Batch norm over all ranks as others write it: torch's own operations, and collectives that carry gradients.

Written from the formulas, as equivalents of the published code.

- `ReducedBatchNorm2d`: one all-reduce of the means of x and x², as detectron2's NaiveSyncBatchNorm (equal local
  batches).
- `GatheredBatchNorm2d`: all ranks' means, variances and counts gathered, as in torch's SyncBatchNorm, which has no
  CPU kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

POSITIONS = (0, 2, 3)


class ReducedBatchNorm2d(nn.BatchNorm2d):
    """E[x] and E[x²] over the ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W], as many rows on every rank."""
        means = torch.stack((input.float().mean(POSITIONS), input.float().square().mean(POSITIONS)))
        total: Tensor = _AllReduce.apply(means)
        mean, mean_square = total / dist.get_world_size()
        return _update_and_normalise(self, input, mean, mean_square - mean.square())


class GatheredBatchNorm2d(nn.BatchNorm2d):
    """Means, variances and counts of all ranks, merged."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W]."""
        channels = input.shape[1]
        var, mean = torch.var_mean(input.float(), POSITIONS, correction=0)
        count = mean.new_full((1,), input.numel() / channels)
        ranks: Tensor = _AllGather.apply(torch.cat((mean, var, count)))
        means, variances, counts = ranks[:, :channels], ranks[:, channels:-1], ranks[:, -1:]
        share = counts / counts.sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        return _update_and_normalise(self, input, mean, var)


def _update_and_normalise(norm: nn.BatchNorm2d, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var, norm.momentum)
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    offset = norm.bias - mean * scale
    scale, offset = (t.to(input.dtype).view(-1, 1, 1) for t in (scale, offset))
    return input * scale + offset


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _AllGather(torch.autograd.Function):
    """A row on each rank → [W, …] on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather_into_tensor(gathered, x[None])
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
