"""Which figures about the representation a run takes while it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """What watches the encoder during pretraining. None of it changes what is learned."""

    linear_probe: bool = False
    """Train a linear classifier on the detached representations of every step, and log its loss and accuracy. Needs
    labels."""
    probe_lr: float = 4.0
    """The probe's learning rate, constant; relative to the mean square of the representations, so that one rate fits
    every encoder."""
    probe_momentum: float = 0.9
    """The probe's momentum."""
    knn_every_epochs: int = 0
    """Measure the accuracy of nearest neighbours at the end of every so many epochs; 0: never. Needs `test_data`."""
    train_data: str | None = None
    """The labelled `.beton` that neighbours are taken from; null: `data.path`, of which `data.labelled` may show some
    labels alone."""
    test_data: str | None = None
    """The labelled `.beton` that is classified by its neighbours."""
    knn_train_samples: int = 20_000
    """At most so many samples of `train_data`, as many of each class as there are; 0: all."""
    knn_test_samples: int = 10_000
    """At most so many samples of `test_data`, likewise; 0: all."""
    knn_neighbours: int = 20
    """Neighbours that vote."""
    knn_batch_size: int = 256
    """Images that a rank takes through the encoder at a time."""
    watch_collapse: bool = True
    """At every line of metrics, measure how far the representations are spread, and warn where they collapse."""

    def __post_init__(self) -> None:
        for name, low in (
            ("knn_every_epochs", 0),
            ("knn_train_samples", 0),
            ("knn_test_samples", 0),
            ("knn_neighbours", 1),
            ("knn_batch_size", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"`online.{name}` must be at least {low}, got {getattr(self, name)}")
        if not 0.0 < self.probe_lr < math.inf:
            raise ValueError(f"`online.probe_lr` must be finite and above 0, got {self.probe_lr}; usual: 1 to 8")
        if not 0.0 <= self.probe_momentum < 1.0:
            raise ValueError(f"`online.probe_momentum` must be in [0, 1), got {self.probe_momentum}; usual: 0.9")
        if self.knn_every_epochs and self.test_data is None:
            raise ValueError(
                "`online.knn_every_epochs` needs `online.test_data`, got null; name a labelled .beton that is "
                "classified, or set `online.knn_every_epochs` to 0"
            )
        if 0 < self.knn_train_samples < self.knn_neighbours:
            raise ValueError(
                f"`online.knn_train_samples` must be at least `online.knn_neighbours`, {self.knn_neighbours}, got "
                f"{self.knn_train_samples}; take more samples, 0 for all, or fewer neighbours"
            )
