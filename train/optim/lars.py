"""LARS (layer-wise adaptive rate scaling), SimCLR's optimizer, in the classic form of google's released code.

Sources: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017;
google-research/simclr, lars_optimizer.py with `classic_momentum=True`. The formula is in
`train.optim.lars_reference`.

Two things differ from the form of lightly, solo-learn and timm: the learning rate is applied *inside* the
momentum, so that a change of rate reaches the update only through new gradients; and the denominator of the
trust ratio is the norm of the decayed gradient, not a sum of two norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class LARSConfig:
    """Hyperparameters of LARS; the defaults are SimCLR's (v1, section 2.3; momentum and η from its code)."""

    base_lr: float = 0.3
    """Learning rate before scaling by the global batch size; SimCLR: 0.3 (`linear`) or 0.075 (`sqrt`)."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """`linear`: peak rate = base_lr · batch / 256; `sqrt`: peak rate = base_lr · √batch."""
    momentum: float = 0.9
    """Share of the last update that is kept, in [0, 1)."""
    weight_decay: float = 1e-6
    """L2 penalty, added to the gradient of every parameter but biases and norms."""
    trust_coefficient: float = 1e-3
    """η: the length of one update of rate 1, as a share of the parameter's norm."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`optim.{name}` must be finite and not negative, got {getattr(self, name)}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`optim.momentum` must be in [0, 1), got {self.momentum}; SimCLR's is 0.9")
        if not 0.0 < self.trust_coefficient < math.inf:
            raise ValueError(
                f"`optim.trust_coefficient` must be positive, got {self.trust_coefficient}; SimCLR's is 0.001"
            )


def peak_lr(config: LARSConfig, global_batch_size: int) -> float:
    """The rate at the end of the warm-up: base_lr · B / 256, or base_lr · √B (SimCLR v1, appendix B.1)."""
    if config.lr_scaling == "linear":
        return config.base_lr * global_batch_size / 256
    return config.base_lr * math.sqrt(global_batch_size)


class LARS(Optimizer):
    """LARS over groups from `train.optim.param_groups`.

    A group with `adapt=False` takes plain momentum steps (trust ratio 1). State: one buffer per parameter,
    `momentum`, made at the first step in which the parameter has a gradient. A step never waits for a device.

    Args:
        params: parameters, or groups that may carry `lr`, `momentum`, `weight_decay` and `adapt`.
        lr: learning rate; a schedule sets `group["lr"]` before each step.
        momentum: in [0, 1).
        weight_decay: L2 penalty added to the gradient.
        trust_coefficient: η of the trust ratio.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                _update(param, param.grad, state["momentum"], group)
        return loss


def trust_ratio(param: Tensor, decayed_grad: Tensor, trust_coefficient: float) -> Tensor:
    """η ‖p‖ / ‖g + λp‖ as a tensor without dimensions; 1 where either norm is 0."""
    param_norm = torch.linalg.vector_norm(param)
    grad_norm = torch.linalg.vector_norm(decayed_grad)
    ratio = trust_coefficient * param_norm / grad_norm
    return torch.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)


def _update(param: Tensor, grad: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    """One parameter's step, in place in `param` and `buffer`."""
    if group["weight_decay"] != 0:
        grad = torch.add(grad, param, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"])
    if group["adapt"]:
        # The factor stays a tensor: `.item()` would stop the host once for every parameter.
        buffer.addcmul_(grad, group["lr"] * trust_ratio(param, grad, group["trust_coefficient"]))
    else:
        buffer.add_(grad, alpha=group["lr"])
    param.sub_(buffer)
