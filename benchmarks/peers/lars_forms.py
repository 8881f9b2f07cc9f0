"""LARS as others step it: a loop over the parameters in Python, with the norms read back on the host.

Written from the formulas, as equivalents of the published code. Both scale by r = η ‖p‖ / (‖g‖ + λ‖p‖ + ε), where
google's form has η ‖p‖ / ‖g + λp‖, and apply the learning rate outside the momentum.

- `LightlyLARS`: lightly 1.5, `utils/lars.py`. Groups without weight decay are not scaled.
- `ApexLARC`: NVIDIA apex 25.04, `parallel/LARC.py` with `clip=False` around torch's SGD. It rewrites the gradients,
  and scales every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

EPS = 1e-8


class LightlyLARS:
    """v ← m v + r (g + λp);  p ← p − lr v."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, trust_coefficient: float):
        self._groups = [(list(group["params"]), float(group["weight_decay"])) for group in groups]
        self._lr, self._momentum, self._trust_coefficient = lr, momentum, trust_coefficient
        self._buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        for params, weight_decay in self._groups:
            for param in params:
                grad = param.grad
                ratio = _ratio(param, weight_decay, self._trust_coefficient)
                if weight_decay != 0 and ratio is not None:
                    grad = grad.add(param, alpha=weight_decay)
                    grad *= ratio
                if param in self._buffers:
                    self._buffers[param].mul_(self._momentum).add_(grad)
                else:
                    self._buffers[param] = grad.clone()
                param.add_(self._buffers[param], alpha=-self._lr)


class ApexLARC:
    """g ← r (g + λp), and then a step of SGD without weight decay."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, trust_coefficient: float):
        self._groups = [(list(group["params"]), float(group["weight_decay"])) for group in groups]
        self._trust_coefficient = trust_coefficient
        params = [param for params, _ in self._groups for param in params]
        self._sgd = SGD(params, lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        for params, weight_decay in self._groups:
            for param in params:
                ratio = _ratio(param, weight_decay, self._trust_coefficient)
                if ratio is not None:
                    param.grad += weight_decay * param
                    param.grad *= ratio
        self._sgd.step()


def _ratio(param: Tensor, weight_decay: float, trust_coefficient: float) -> Tensor | None:
    """r; None where a norm is 0, which the comparison finds out by waiting for it."""
    assert param.grad is not None
    param_norm, grad_norm = param.norm(), param.grad.norm()
    if param_norm == 0 or grad_norm == 0:
        return None
    ratio: Tensor = param_norm / (grad_norm + weight_decay * param_norm + EPS) * trust_coefficient
    return ratio
