"""The loss of a contrastive method as a module: one of SimCLR's losses, its options, and perhaps a learned temperature.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from model.exchange import Exchange
from model.losses.margin_triplet import DEFAULT_MARGIN, margin_triplet
from model.losses.nt_logistic import nt_logistic
from model.losses.pairs import PairLossOutput
from model.ntxent.loss import NTXentOutput, nt_xent

LossName = Literal["nt_xent", "nt_logistic", "margin_triplet"]
LEARNED_RANGE = (0.01, 100.0)
"""Where a learned τ stays: from CLIP's bound on its scale, 1/τ ≤ 100, to the largest τ of SimCLR's table 5."""


class _Bounded(torch.autograd.Function):
    """log τ → itself, within LEARNED_RANGE."""

    @staticmethod
    def forward(ctx: Any, log_temperature: Tensor) -> Tensor:
        low, high = (math.log(bound) for bound in LEARNED_RANGE)
        ctx.save_for_backward(log_temperature)
        return log_temperature.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Nothing where a step against it would lead further out."""
        (log_temperature,) = ctx.saved_tensors
        low, high = (math.log(bound) for bound in LEARNED_RANGE)
        leads_out = ((log_temperature < low) & (grad > 0)) | ((log_temperature > high) & (grad < 0))
        return grad.masked_fill(leads_out, 0.0)


class ContrastiveLoss(nn.Module):
    """(z1 [N, D], z2 [N, D]) → the scalar loss, and detached scalars to log; all ranks must call.

    The metrics are `contrastive_accuracy` (see `NTXentOutput`) and, where it is learned, `temperature`.

    Attributes:
        log_temperature: the learned log τ [1], so that optimizers neither decay nor adapt it (DeepSpeed cannot
            broadcast a scalar); None if τ stays. Beyond LEARNED_RANGE the loss sees the bound, and of the gradient
            only what leads back arrives: nothing but momentum carries it further. Gradients of the ranks are to be
            averaged, as all are.
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        *,
        name: LossName = "nt_xent",
        temperature: float = 0.1,
        learn_temperature: bool = False,
        normalize: bool = True,
        semi_hard: bool = False,
        margin: float | None = None,
        exchange: Exchange = "all_gather",
    ) -> None:
        """Arguments as `check_options` and the losses' own functions explain them.

        Raises:
            ValueError: see `check_options`.
        """
        super().__init__()
        check_options(
            loss=name,
            temperature=temperature,
            learn_temperature=learn_temperature,
            semi_hard=semi_hard,
            margin=margin,
            exchange=exchange,
        )
        self.name: LossName = name
        self.normalize, self.semi_hard, self.exchange = normalize, semi_hard, exchange
        self.margin = DEFAULT_MARGIN if margin is None else margin
        self._temperature = temperature
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(temperature))) if learn_temperature else None

    def temperature(self) -> float | Tensor:
        """τ; a scalar tensor with a gradient where it is learned."""
        if self.log_temperature is None:
            return self._temperature
        bounded: Tensor = _Bounded.apply(self.log_temperature.float())
        return bounded.exp().squeeze()

    def forward(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics."""
        temperature = self.temperature()
        output: NTXentOutput | PairLossOutput
        if self.name == "nt_xent":
            output = nt_xent(z1, z2, temperature=temperature, normalize=self.normalize, exchange=self.exchange)
        elif self.name == "nt_logistic":
            output = nt_logistic(
                z1,
                z2,
                temperature=temperature,
                normalize=self.normalize,
                semi_hard=self.semi_hard,
                exchange=self.exchange,
            )
        else:
            output = margin_triplet(
                z1,
                z2,
                margin=self.margin,
                normalize=self.normalize,
                semi_hard=self.semi_hard,
                exchange=self.exchange,
            )
        metrics = {"contrastive_accuracy": output.contrastive_accuracy}
        if isinstance(temperature, Tensor):
            metrics["temperature"] = temperature.detach()
        return output.loss, metrics

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.name}, normalize={self.normalize}, semi_hard={self.semi_hard}, exchange={self.exchange}"


def check_options(
    *,
    loss: str,
    temperature: float,
    learn_temperature: bool,
    semi_hard: bool,
    margin: float | None,
    exchange: str,
) -> None:
    """Refuse options that a loss does not have, named as in the configuration.

    Args:
        loss: a LossName.
        temperature: τ > 0; the initial one, in LEARNED_RANGE, where it is learned. Not used by the margin triplet.
        learn_temperature: NT-Xent and NT-Logistic.
        semi_hard: NT-Logistic and the margin triplet.
        margin: the margin triplet; None is DEFAULT_MARGIN.
        exchange: see `model.exchange`.

    Raises:
        ValueError: as said, in one line.
    """
    if loss not in get_args(LossName):
        raise ValueError(f"`model.loss` must be 'nt_xent', 'nt_logistic' or 'margin_triplet', got {loss!r}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"`model.temperature` must be a finite number > 0, got {temperature}; try 0.1")
    low, high = LEARNED_RANGE
    if learn_temperature and loss == "margin_triplet":
        raise ValueError(
            "`model.learn_temperature` needs a loss with a temperature, not 'margin_triplet'; leave it out"
        )
    if learn_temperature and not low <= temperature <= high:
        raise ValueError(
            f"`model.temperature` must be in [{low:g}, {high:g}] to be learned, got {temperature}; try 0.1"
        )
    if semi_hard and loss == "nt_xent":
        raise ValueError(
            "`model.semi_hard` is for 'nt_logistic' and 'margin_triplet', got 'nt_xent', which weighs negatives by "
            "their hardness itself; leave it out"
        )
    if margin is not None and loss != "margin_triplet":
        raise ValueError(f"`model.margin` is for 'margin_triplet', got {margin} with {loss!r}; leave it out")
    if margin is not None and not (margin >= 0 and math.isfinite(margin)):
        raise ValueError(f"`model.margin` must be a finite number ≥ 0, got {margin}; SimCLR tried 0, 0.4, 0.8 and 1.6")
    if exchange not in get_args(Exchange):
        raise ValueError(f"`model.exchange` must be 'all_gather' or 'ring', got {exchange!r}")
