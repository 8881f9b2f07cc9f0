"""The formula of LARS on one parameter, in the classic form of google-research/simclr, lars_optimizer.py.

    g ← g + λ p
    r = η ‖p‖ / ‖g‖        (1 where either norm is 0, and for parameters that are not adapted)
    v ← m v + lr · r · g
    p ← p − v

It is the truth that the optimizer is tested against: pure, obvious, and exact in float64.
"""

from __future__ import annotations

from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Return the next parameter and the next momentum buffer; nothing is changed in place.

    Args:
        param: p, of any shape and floating dtype.
        grad: its gradient, of the same shape.
        momentum_buffer: v, of the same shape; zeros before the first step.
        lr: learning rate of this step.
        momentum: m.
        weight_decay: λ.
        trust_coefficient: η.
        adapt: False gives r = 1.
    """
    grad = grad + weight_decay * param
    ratio = 1.0
    param_norm = param.square().sum().sqrt().item()
    grad_norm = grad.square().sum().sqrt().item()
    if adapt and param_norm > 0 and grad_norm > 0:
        ratio = trust_coefficient * param_norm / grad_norm
    momentum_buffer = momentum * momentum_buffer + lr * ratio * grad
    return param - momentum_buffer, momentum_buffer
