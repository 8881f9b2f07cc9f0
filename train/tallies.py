"""What the loop counts between two lines of metrics, and over an epoch."""

from __future__ import annotations

import math
import time

EPOCH_MEANS = ("loss", "probe_accuracy")  # metrics whose mean over an epoch's lines can tell the best checkpoint


class Stopwatch:
    """Times the steps since the last line of metrics: images a second, and the share spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self._waiting = 0.0

    def record(self, num_images: int, waited: float) -> None:
        """Count one step: images over all ranks, and the seconds in which this rank waited for them."""
        self._images += num_images
        self._waiting += waited

    def read(self) -> dict[str, float]:
        """What was measured since the last reading; starts again."""
        elapsed = time.perf_counter() - self._start
        figures = {"images_per_sec": self._images / elapsed, "data_wait": self._waiting / elapsed}
        self._start, self._images, self._waiting = time.perf_counter(), 0, 0.0
        return figures


class EpochMeans:
    """Means of some metrics over the lines of an epoch; part of a checkpoint, so that a resume changes none of them."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, metrics: dict[str, float]) -> None:
        """Count a line; what is not finite is left out."""
        for name in EPOCH_MEANS:
            if math.isfinite(metrics.get(name, math.nan)):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = [total + metrics[name], count + 1]

    def mean(self, name: str) -> float | None:
        """None where no line had it."""
        total, count = self._sums.get(name, (0.0, 0))
        return total / count if count else None

    def clear(self) -> None:
        """An epoch begins."""
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        """As JSON holds it: numbers come back to the last bit."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from `state_dict()`."""
        self._sums = {name: list(pair) for name, pair in state.items()}
