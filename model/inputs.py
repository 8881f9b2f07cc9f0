"""What every loss asks of the projections it is given.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_projections(z1: Tensor, z2: Tensor, group: dist.ProcessGroup | None) -> None:
    """Refuse projections of two views that no loss can serve. All ranks of `group` must call.

    Row counts of the ranks are compared first, since a rank that finds fault with its own alone would leave the
    others waiting. That is seen on CPU tensors only: asking would stall a GPU every step.

    Raises:
        ValueError: not [N, D] alike with N, D ≥ 1; a dtype outside DTYPES, or two; N that differs between ranks.
    """
    if z1.device.type == "cpu" and z1.ndim > 0:
        collectives.check_equal_rows(z1, group)
    if z1.shape != z2.shape or z1.ndim != 2 or not z1.numel():
        raise ValueError(f"z1 and z2 must be [N, D] alike with N, D ≥ 1, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if z1.dtype != z2.dtype or z1.dtype not in DTYPES:
        raise ValueError(
            f"z1 and z2 must share one of the dtypes float64, float32, bfloat16 and float16, "
            f"got {z1.dtype} and {z2.dtype}"
        )


def check_temperature(temperature: float | Tensor) -> float | Tensor:
    """Refuse a τ that is not a finite number above 0; a tensor must be a scalar, and its value is not read.

    Returns:
        τ; a tensor in at least float32.

    Raises:
        ValueError: as said.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"`temperature` must be a number or a floating-point scalar tensor, got {temperature.dtype} of shape "
                f"{tuple(temperature.shape)}"
            )
        return temperature if temperature.dtype == torch.float64 else temperature.float()
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}; SimCLR uses 0.1 to 0.5")
    return temperature
