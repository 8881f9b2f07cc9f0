"""What `evaluate.py linear` is told: the linear evaluation of SimCLR v1, and a grid about its learning rate.

Appendix B.6: Nesterov momentum 0.9, learning rate 0.1·B/256, 90 epochs of batches of 4,096, no weight decay, no
warm-up, random crops with flips in training, the central view in testing. The cosine decay to 0 and weights that start
from 0 are google-research/simclr's (`tf2/model.py`, and the flags that its README gives for it: `--train_mode=finetune
--fine_tune_after_block=4 --zero_init_logits_layer=True --optimizer=momentum --warmup_epochs=0`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from train.evaluation.linear_probe import Head
from train.evaluation.protocol import EvaluationConfig

PAPER_BATCH, SMALL_BATCH = 4096, 256
LARGE_SET = 100_000  # images: from there on, an epoch has enough batches of the paper's size


@dataclass(frozen=True, kw_only=True)
class LinearConfig(EvaluationConfig):
    """How linear classifiers are trained, and which of them counts."""

    features: Literal["streamed", "cached"] = "streamed"
    """`streamed`: random crops and flips, other ones in every epoch, as in the paper. `cached`: representations that
    are computed once, and kept: far cheaper."""
    augmented_epochs: int = 0
    """Of `cached`: so many passes of random crops and flips are kept, and used in turn; 0: one of central views."""
    base_lrs: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Learning rates to try, per 256 images; the paper's is 0.1. All are trained at once."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays to try with each of them; the paper has none."""
    val_fraction: float = 0.1
    """Share of every class's training images that chooses among several settings; of one setting, nothing is held
    out."""
    epochs: int = 90
    """To train for."""
    global_batch_size: int | None = None
    """Images of an update, over all ranks. null: 4096 as in the paper; 256 for sets of fewer than 100,000 images."""
    momentum: float = 0.9
    """Nesterov's."""
    init_std: float = 0.0
    """Of the normal distribution that weights start from."""
    num_seeds: int = 1
    """Trainings, from `seed` on: initial weights, order and crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "num_seeds", "global_batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}")
        if self.features not in ("streamed", "cached"):
            raise ValueError(f"`features` must be streamed or cached, got {self.features}")
        _check_grid("base_lrs", self.base_lrs, "positive", lambda value: value > 0)
        _check_grid("weight_decays", self.weight_decays, "0 or more", lambda value: value >= 0)
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(
                f"`val_fraction` must be between 0 and 1, got {self.val_fraction}; to hold nothing out, give one of "
                "`base_lrs` and one of `weight_decays`"
            )
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum}")
        if not 0.0 <= self.init_std < math.inf:
            raise ValueError(f"`init_std` must be finite and not negative, got {self.init_std}")
        if self.augmented_epochs < 0 or (self.augmented_epochs and self.features != "cached"):
            raise ValueError(
                f"`augmented_epochs` must be 0, or positive with `features` cached, got {self.augmented_epochs} with "
                f"{self.features}"
            )

    @property
    def settings(self) -> list[Head]:
        """Every pair of a base rate and a weight decay."""
        pairs = itertools.product(self.base_lrs, self.weight_decays)
        return [Head(base_lr=base_lr, weight_decay=decay) for base_lr, decay in pairs]

    def batch_size_for(self, num_images: int, world_size: int) -> int:
        """B: images of an update, over all ranks.

        Raises:
            ValueError: the ranks cannot share it equally, or there are fewer images.
        """
        paper = PAPER_BATCH if num_images >= LARGE_SET else SMALL_BATCH
        size = self.global_batch_size or min(paper, num_images) // world_size * world_size
        if size % world_size or not 1 <= size <= num_images:
            raise ValueError(
                f"`global_batch_size` must be divisible by world size {world_size} and at most {num_images}, the "
                f"images of `train_data`, got {size or num_images}"
            )
        return size


def _check_grid(name: str, values: Sequence[float], wanted: str, fits: Callable[[float], bool]) -> None:
    if (
        not values
        or len(set(values)) < len(values)
        or not all(fits(value) and math.isfinite(value) for value in values)
    ):
        raise ValueError(f"`{name}` must be a list of different finite numbers, each {wanted}, got {list(values)}")
