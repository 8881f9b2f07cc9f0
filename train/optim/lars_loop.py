"""The reference backend of LARS: stretch by stretch, in torch, for any device and floating dtype.

It reads nothing back from the device. Arithmetic on 16-bit parameters is in float32, and rounded when stored. The
formulas are those of `train.optim.lars_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.optim.lars_reference import EPS, LARGEST
from train.optim.stretches import Options, Stretches, norm_dtype


def step(stretches: Stretches, skip: Tensor | None) -> None:
    """A whole step, where every tensor is one stretch."""
    update(stretches, squared_norms(stretches), skip)


def squared_norms(stretches: Stretches) -> Tensor:
    """The stretches' part of ‖p‖² and of ‖d‖² [num_tensors, 2]; at least one stretch."""
    first = stretches.params[0]
    norms = torch.zeros(stretches.num_tensors, 2, dtype=norm_dtype(first), device=first.device)
    for param, grad, buffer, tensor, options in zip(*stretches[:5], strict=True):
        if options.adapt:
            p = _wide(param)
            measured = _measured(p, _wide(grad), _wide(buffer), options)
            norms[tensor] += torch.stack([torch.linalg.vector_norm(x, dtype=norms.dtype) for x in (p, measured)]) ** 2
    return norms


def update(stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
    """Change `params` and `buffers`, given the sums over all stretches and ranks."""
    norms = squared_norms.sqrt()
    for param, grad, buffer, tensor, options in zip(*stretches[:5], strict=True):
        new_param, new_buffer = _next(_wide(param), _wide(grad), _wide(buffer), norms[tensor], options)
        for old, new in ((param, new_param), (buffer, new_buffer)):
            old.copy_(new if skip is None else torch.where(skip, _wide(old), new))


def _measured(p: Tensor, g: Tensor, v: Tensor, options: Options) -> Tensor:
    """What the form compares with p."""
    if options.form == "larc":
        return g
    decayed = torch.add(g, p, alpha=options.weight_decay)
    if options.form == "classic":
        return decayed
    buffer = torch.add(decayed, v, alpha=options.momentum)
    return torch.add(decayed, buffer, alpha=options.momentum) if options.nesterov else buffer


def _next(p: Tensor, g: Tensor, v: Tensor, norms: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The next parameter and buffer; `norms` [2] holds ‖p‖ and the norm that the form measures."""
    # Factors stay tensors: `.item()` would stop the host once for every stretch.
    param_norm, measured = norms
    decay = torch.full_like(param_norm, options.weight_decay)
    trust = torch.ones_like(param_norm)
    if options.adapt:
        known = (param_norm > 0) & (measured > 0)
        if options.form == "larc":
            measured = measured + options.weight_decay * param_norm + EPS
            decay = torch.where(known, decay, 0.0)
        ratio = options.trust_coefficient * param_norm / measured
        # Beyond float32 is the norm of a gradient next to nothing, which in float32 would be 0.
        trust = torch.where(known & (options.lr * ratio <= LARGEST), ratio, 1.0)
    scale = rate = torch.ones_like(trust)
    if options.form == "classic":
        scale = options.lr * trust
    elif options.form == "non_classic":
        rate = options.lr * trust
    else:
        scale, rate = trust, options.lr * rate

    new = torch.addcmul(g, decay.to(p.dtype), p).mul_(scale.to(p.dtype))
    buffer = torch.add(new, v, alpha=options.momentum)
    moved = new.add_(buffer, alpha=options.momentum) if options.nesterov else buffer
    return torch.addcmul(p, rate.to(p.dtype), moved, value=-1), buffer


def _wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.float() if x.dtype in {torch.bfloat16, torch.float16} else x
