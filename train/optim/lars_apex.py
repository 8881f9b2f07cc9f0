"""A backend of LARS out of NVIDIA apex's CUDA kernels: its norms of many tensors, and its SGD over many tensors.

Source: NVIDIA apex, csrc/multi_tensor_l2norm_kernel.cu and multi_tensor_sgd_kernel.cu, as its `FusedSGD` calls them
(extension `amp_C`). Between the two stands one scaled copy of the gradients, since that SGD has one rate for all
tensors. It fits the forms that scale what enters the momentum: classic and larc.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from train.optim.lars_reference import EPS
from train.optim.stretches import Options, Stretches, norm_dtype

CHUNK = 2048 * 32
"""Elements of a tensor that a block of threads takes; apex's own."""


def step(stretches: Stretches, skip: Tensor | None) -> None:
    """A whole step, where every tensor is one stretch."""
    update(stretches, squared_norms(stretches), skip)


def squared_norms(stretches: Stretches) -> Tensor:
    """The stretches' part of ‖p‖² and of ‖d‖² [num_tensors, 2]; at least one stretch."""
    device = stretches.params[0].device
    norms = torch.zeros(stretches.num_tensors, 2, dtype=norm_dtype(stretches.params[0]), device=device)
    for options, chosen in _by_options(stretches).items():
        if options.adapt:
            params, grads, _ = _flat(stretches, chosen)
            measured = (
                grads if options.form == "larc" else torch._foreach_add(grads, params, alpha=options.weight_decay)
            )
            tensors = _index(tuple(stretches.tensors[i] for i in chosen), device)
            for column, many in enumerate((params, measured)):
                overflow = torch.zeros(1, dtype=torch.int32, device=device)  # set at NaN, which the norm shows anyway
                found = _kernels().multi_tensor_l2norm(CHUNK, overflow, [many], True)[1]
                norms[:, column].index_add_(0, tensors, found.to(norms.dtype).square())
    return norms


def update(stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
    """Change `params` and `buffers`, given the sums over all stretches and ranks."""
    device = stretches.params[0].device
    leave = torch.zeros(1, dtype=torch.int32, device=device) if skip is None else skip.to(torch.int32).reshape(1)
    for options, chosen in _by_options(stretches).items():
        params, grads, buffers = _flat(stretches, chosen)
        fresh = _decayed(grads, params, options)
        tensors = _index(tuple(stretches.tensors[i] for i in chosen), device)
        scales = _scales(squared_norms[tensors].sqrt(), options).to(params[0].dtype)
        torch._foreach_mul_(fresh, list(scales.unbind()))
        rate = 1.0 if options.form == "classic" else options.lr
        # weight decay, momentum, dampening, rate, Nesterov, first run, decay after momentum, scale of the gradient
        settings = (0.0, options.momentum, 0.0, rate, options.nesterov, False, False, 1.0)
        _kernels().multi_tensor_sgd(CHUNK, leave, [fresh, params, buffers], *settings)


@functools.lru_cache(maxsize=64)
def _index(tensors: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of tensors on the device; sending them would make the host wait, so they are sent once."""
    return torch.tensor(tensors, device=device)


def _decayed(grads: list[Tensor], params: list[Tensor], options: Options) -> list[Tensor]:
    """New tensors g + λp."""
    return list(torch._foreach_add(grads, params, alpha=options.weight_decay))


def _scales(norms: Tensor, options: Options) -> Tensor:
    """What multiplies each stretch's d [n], from ‖p‖ and the norm that the form measures [n, 2]."""
    param_norm, measured = norms.unbind(1)
    scales = torch.ones_like(param_norm)
    if options.adapt and options.form == "larc":
        ratio = options.trust_coefficient * param_norm / (measured + options.weight_decay * param_norm + EPS)
        # Without decay where a norm is 0: there p = 0, and d = g as it is, or g = 0, and nothing is to be added.
        scales = torch.where(measured > 0, torch.where(param_norm > 0, ratio, 1.0), 0.0)
    elif options.adapt:
        known = (param_norm > 0) & (measured > 0)
        scales = torch.where(known, options.trust_coefficient * param_norm / measured, 1.0)
    return options.lr * scales if options.form == "classic" else scales


def _by_options(stretches: Stretches) -> dict[Options, list[int]]:
    """The stretches that one call of a kernel can take together."""
    together: dict[Options, list[int]] = {}
    for i, options in enumerate(stretches.options):
        together.setdefault(options, []).append(i)
    return together


def _flat(stretches: Stretches, chosen: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and buffers in the order of their memory, whatever their strides."""
    params, grads, buffers = (
        [many[i].as_strided((many[i].numel(),), (1,)) for i in chosen]
        for many in (stretches.params, stretches.grads, stretches.buffers)
    )
    return params, grads, buffers


def _kernels() -> Any:
    return importlib.import_module("amp_C")
