"""The learning rate as a pure function of the step: linear warm-up, then a cosine down to 0.

As in google's released code (google-research/simclr, tf2/model.py, `WarmUpAndCosineDecay`). For a run of T
steps with W of warm-up, where t updates are already done:

    t < W:  lr(t) = peak · t / W
    t ≥ W:  lr(t) = peak · ½ (1 + cos(π (t − W) / (T − W)))

So the first update of a run that warms up (t = 0) has rate 0 and moves nothing, the one at t = W has the peak
rate, and the last one (t = T − 1) has a small rate that is not 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves during a run."""

    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0 to the peak rate; then a cosine to 0 (SimCLR v1, section 2.3)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_epochs < math.inf:
            raise ValueError(
                f"`schedule.warmup_epochs` must be finite and not negative, got {self.warmup_epochs}; use 0 for none"
            )


def num_warmup_steps(config: ScheduleConfig, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up, rounded to a whole number.

    Raises:
        ValueError: the warm-up leaves no step of the run for the cosine.
    """
    steps = round(config.warmup_epochs * steps_per_epoch)
    if steps >= total_steps:
        raise ValueError(
            f"`schedule.warmup_epochs` must be shorter than the run of {total_steps} steps "
            f"({total_steps / steps_per_epoch:g} epochs), got {config.warmup_epochs:g} ({steps} steps); "
            "warm up for a tenth of the run, or train longer"
        )
    return steps


def learning_rate(step: int, *, peak_lr: float, total_steps: int, warmup_steps: int) -> float:
    """The rate of the update that follows `step` finished ones, `step` in [0, total_steps]; 0 at the end."""
    assert 0 <= step <= total_steps
    assert 0 <= warmup_steps < total_steps
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
