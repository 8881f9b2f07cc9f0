"""What changes during a run, as pure functions of the step or the epoch: the learning rate and the side of the views.

The rate rises linearly, then decays. For a run of T steps with W of warm-up, where t updates are already done:

    t < W:  lr(t) = peak · t / W
    t ≥ W:  lr(t) = peak · decay((t − W) / (T − W))

    cosine:  decay(p) = ½ (1 + cos πp)        linear:  decay(p) = 1 − p        constant:  decay(p) = 1

The warm-up with the cosine is google's released code (google-research/simclr, tf2/model.py, `WarmUpAndCosineDecay`).
So the first update of a run that warms up (t = 0) has rate 0 and moves nothing, the one at t = W has the peak rate, and
the last one (t = T − 1) has a small rate that is not 0.

`every: epoch` decays once an epoch: each step has the rate that the first step of its epoch has. The warm-up still
rises with every step, since a rate held at its first value would be 0 for a whole epoch; where the warm-up ends within
an epoch, the peak holds to the end of that epoch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["cosine", "linear", "constant"]

WARMUP_EPOCHS = 10.0  # SimCLR v1, section 2.3


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate, and the side of the views, move during a run."""

    warmup_epochs: float | None = WARMUP_EPOCHS
    """Epochs of linear warm-up from 0 to the peak rate (SimCLR v1, section 2.3: 10); then the decay. null where
    `warmup_steps` takes the place of a configuration file's epochs."""
    warmup_steps: int | None = None
    """The warm-up's length in steps, instead of epochs; null: `warmup_epochs` counts."""
    decay: Decay = "cosine"
    """From the peak rate to 0 along half a cosine, as SimCLR's; in a straight line; or not at all."""
    every: Literal["step", "epoch"] = "step"
    """Whether the decay moves with each step, or holds through an epoch the rate of its first step; the warm-up moves
    with each step."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """Progressive resizing: pairs of a first epoch, from 0, and the side of the views from there on, such as
    [[0, 160], [60, 192], [80, 224]]. The last side is `augment.size`. null: that one throughout."""

    def __post_init__(self) -> None:
        if self.warmup_epochs is None and self.warmup_steps is None:
            raise ValueError(
                "`schedule.warmup_epochs` and `schedule.warmup_steps` must not both be null; 0: no warm-up"
            )
        if self.warmup_epochs is not None and not 0.0 <= self.warmup_epochs < math.inf:
            raise ValueError(
                f"`schedule.warmup_epochs` must be finite and not negative, got {self.warmup_epochs}; use 0 for none"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(
                f"`schedule.warmup_steps` must be null or not negative, got {self.warmup_steps}; use 0 for none"
            )
        if self.warmup_steps is not None and self.warmup_epochs not in (None, WARMUP_EPOCHS):
            raise ValueError(
                "`schedule.warmup_epochs` and `schedule.warmup_steps` must not both be given, "
                f"got {self.warmup_epochs:g} and {self.warmup_steps}; set one of them to null"
            )
        for name, choices in (("decay", ("cosine", "linear", "constant")), ("every", ("step", "epoch"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`schedule.{name}` must be one of {', '.join(choices)}, got {getattr(self, name)}")
        if self.sizes is not None:
            _check_rising(self.sizes)


def num_warmup_steps(config: ScheduleConfig, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up, rounded to a whole number.

    Raises:
        ValueError: the warm-up leaves no step of the run for the decay.
    """
    name, given, steps = "warmup_steps", float(config.warmup_steps or 0), config.warmup_steps
    if steps is None:
        assert config.warmup_epochs is not None
        name, given, steps = "warmup_epochs", config.warmup_epochs, round(config.warmup_epochs * steps_per_epoch)
    if steps >= total_steps:
        in_steps = f" ({steps} steps)" if config.warmup_steps is None else ""
        raise ValueError(
            f"`schedule.{name}` must be shorter than the run of {total_steps} steps "
            f"({total_steps / steps_per_epoch:g} epochs), got {given:g}{in_steps}; "
            "warm up for a tenth of the run, or train longer"
        )
    return steps


def learning_rate(
    step: int, *, config: ScheduleConfig, peak_lr: float, total_steps: int, steps_per_epoch: int
) -> float:
    """The rate of the update that follows `step` finished ones, `step` in [0, total_steps].

    Raises:
        ValueError: see `num_warmup_steps`.
    """
    assert 0 <= step <= total_steps
    warmup = num_warmup_steps(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    if step < warmup:
        return peak_lr * step / warmup
    if config.every == "epoch":
        step = max(warmup, step // steps_per_epoch * steps_per_epoch)
    return peak_lr * _decay((step - warmup) / (total_steps - warmup), config.decay)


def _decay(progress: float, decay: Decay) -> float:
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if decay == "linear" else 1.0


def size_of_epoch(config: ScheduleConfig, epoch: int, size: int) -> int:
    """The side of the views in `epoch`, from 0; `size`, which is `augment.size`, where nothing else is scheduled."""
    if config.sizes is None:
        return size
    return next(side for first, side in reversed(config.sizes) if first <= epoch)


def check_sizes(config: ScheduleConfig, *, num_epochs: int, size: int) -> None:
    """Refuse a progressive resizing that the run does not go through to its end.

    Args:
        config: of the run.
        num_epochs: of the run.
        size: `augment.size`, which is what the views have at the end.

    Raises:
        ValueError: a side that no epoch has, or another one at the end.
    """
    if config.sizes is None:
        return
    first, last_side = config.sizes[-1]
    if first >= num_epochs:
        raise ValueError(
            f"`schedule.sizes` must begin within the {num_epochs} epochs of the run, got epoch {first} for side "
            f"{last_side}; the last epoch is {num_epochs - 1}"
        )
    if last_side != size:
        raise ValueError(
            f"the last side of `schedule.sizes` must be `augment.size`, {size}, got {last_side}; "
            f"end with [{first}, {size}], or set `augment.size` to {last_side}"
        )


def _check_rising(sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse pairs that do not say the side of every epoch from 0 on, once."""
    plain = [list(pair) for pair in sizes]
    epochs = [first for first, _ in sizes]
    if not epochs or epochs[0] != 0:
        raise ValueError(
            f"`schedule.sizes` must begin with the side of epoch 0, got {plain}; such as [[0, 160], [60, 224]]"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
        raise ValueError(f"`schedule.sizes` must have rising first epochs, got {plain}")
    if min(side for _, side in sizes) < 1:
        raise ValueError(f"`schedule.sizes` must have sides of at least 1 pixel, got {plain}")
