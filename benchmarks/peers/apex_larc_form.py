"""LARS as NVIDIA apex steps it: apex 25.04, `parallel/LARC.py` with `clip=False` around torch's SGD.

Written from the formula, as an equivalent of the published code: apex is installed from its sources alone. A loop over
the parameters in Python scales by r = η ‖p‖ / (‖g‖ + λ‖p‖ + ε), where google's form has η ‖p‖ / ‖g + λp‖. It rewrites
the gradients, and scales every parameter, decayed or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD

EPS = 1e-8


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
                param_norm, grad_norm = param.norm(), param.grad.norm()
                if param_norm != 0 and grad_norm != 0:  # which waits for the norms
                    ratio = self._trust_coefficient * param_norm / (grad_norm + param_norm * weight_decay + EPS)
                    param.grad += weight_decay * param
                    param.grad *= ratio
        self._sgd.step()
