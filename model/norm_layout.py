"""What both ways of computing batch norm over ranks have in common: types and memory formats."""

from __future__ import annotations

import torch
from torch import Tensor

Kept = tuple[Tensor, Tensor, Tensor]
"""What the backward needs of a forward: the mean, what says how far values spread, and the counts."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Of the input, γ and β."""


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Of mean and variance."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The dense format that the CUDA kernels read fastest from `x`."""
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


def in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors that are there, in a dtype."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
