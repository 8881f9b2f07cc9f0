"""The formulas of LARS on one parameter: google's two forms, and that of lightly, solo-learn and NVIDIA apex's LARC.

Sources: google-research/simclr, lars_optimizer.py (`classic_momentum`, `use_nesterov`); lightly 1.6, utils/lars.py;
NVIDIA apex 25.04, parallel/LARC.py with `clip=False` around torch's SGD.

With p the parameter, g its gradient, v the momentum, m its share, λ the weight decay, and η the trust coefficient:

    d = g + λ p
    ρ(x) = η ‖p‖ / x        (1 where ‖p‖ or x is 0, and for parameters that are not adapted)

    classic       v ← m v + lr · ρ(‖d‖) · d                        p ← p − v
        Nesterov                                                   p ← p − (m v + lr · ρ(‖d‖) · d)
    non_classic   v ← m v + d;    u = v                            p ← p − lr · ρ(‖u‖) · u
        Nesterov                  u = m v + d
    larc          v ← m v + ρ(‖g‖ + λ ‖p‖ + ε) · d                 p ← p − lr · v
        Nesterov                                                   p ← p − lr · (m v + ρ(‖g‖ + λ ‖p‖ + ε) · d)

where v on the right of an arrow that moves p is the new one, and ε = 1e-8. In `larc`, an adapted parameter with ‖p‖ or
‖g‖ = 0 is neither scaled nor decayed: it takes ρ = 1 and d = g.

This module is the truth that the optimizer is tested against: pure, obvious, and exact in float64.
"""

from __future__ import annotations

from torch import Tensor

from train.optim.stretches import Form

EPS = 1e-8
LARGEST = 3e38  # of a rate that float32 can hold
"""ε of `larc`, as lightly, solo-learn and apex have it."""


def lars_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt: bool,
    form: Form = "classic",
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the next parameter and the next momentum buffer; nothing is changed in place.

    Args:
        param: p, of any shape and floating dtype.
        grad: its gradient g, of the same shape.
        momentum_buffer: v, of the same shape; zeros before the first step.
        lr: learning rate of this step.
        momentum: m.
        weight_decay: λ.
        trust_coefficient: η.
        adapt: False gives ρ = 1.
        form: which of the three.
        nesterov: move p by what the momentum will be, not by what it is.
    """
    decayed = grad + weight_decay * param
    param_norm = _norm(param)

    def rho(measured: float) -> float:
        return trust_coefficient * param_norm / measured if adapt and param_norm > 0 and measured > 0 else 1.0

    if form == "classic":
        new = lr * rho(_norm(decayed)) * decayed
        buffer = momentum * momentum_buffer + new
        return param - (momentum * buffer + new if nesterov else buffer), buffer

    if form == "non_classic":
        buffer = momentum * momentum_buffer + decayed
        update = momentum * buffer + decayed if nesterov else buffer
        return param - lr * rho(_norm(update)) * update, buffer

    grad_norm = _norm(grad)
    if adapt and (param_norm == 0 or grad_norm == 0):
        new = grad
    else:
        new = rho(grad_norm + weight_decay * param_norm + EPS) * decayed
    buffer = momentum * momentum_buffer + new
    return param - lr * (momentum * buffer + new if nesterov else buffer), buffer


def _norm(x: Tensor) -> float:
    return x.square().sum().sqrt().item()
