"""The transformations that a representation is asked about: SimCLR v1, table 3, its published values, and our draws.

The paper's "corrupted" is its Gaussian noise: "we additionally and independently add rotation (one of {0, 90, 180,
270}), Gaussian noise, and Sobel filtering transformation during the pretraining for the last three rows".

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import EXTRA
from pipelines.params import ViewParams

TaskName = Literal["color_vs_grayscale", "rotation", "original_vs_corrupted", "original_vs_sobel"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One transformation, and what of it is to be told."""

    title: str
    """As table 3 names it."""
    changes: dict[str, Any]
    """Fields of a plain `ViewRecipe`: what draws the transformation."""
    applied: Callable[[ViewParams], NDArray[np.int64]]
    """From `VIEW_PARAMS` [n] to classes int64 [n]."""
    num_classes: int
    random_guess: float
    """Share that is right without looking, table 3."""
    published: dict[str, float]
    """Accuracy of h and z, table 3."""


TASKS: dict[TaskName, Task] = {
    "color_vs_grayscale": Task(
        title="Color vs grayscale",
        changes={"gray_prob": 0.2},
        applied=lambda params: params["gray"].astype(np.int64),
        num_classes=2,
        random_guess=0.80,
        published={"h": 0.993, "z": 0.974},
    ),
    "rotation": Task(
        title="Rotation",
        changes=EXTRA["rotate"],
        applied=lambda params: params["quarter_turns"].astype(np.int64),
        num_classes=4,
        random_guess=0.25,
        published={"h": 0.676, "z": 0.256},
    ),
    "original_vs_corrupted": Task(
        title="Orig. vs corrupted",
        changes=EXTRA["noise"],
        applied=lambda params: (params["noise_std"] > 0.0).astype(np.int64),
        num_classes=2,
        random_guess=0.50,
        published={"h": 0.995, "z": 0.596},
    ),
    "original_vs_sobel": Task(
        title="Orig. vs Sobel filtered",
        changes=EXTRA["sobel"],
        applied=lambda params: params["sobel"].astype(np.int64),
        num_classes=2,
        random_guess=0.50,
        published={"h": 0.966, "z": 0.563},
    ),
}
