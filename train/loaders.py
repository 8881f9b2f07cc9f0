"""The loader of each epoch: one at a time, made anew where the side of the views changes (progressive resizing)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pipelines.batch import Loader

logger = logging.getLogger(__name__)


class EpochLoaders:
    """Builds loaders as the epochs need them, and keeps what identifies their data.

    Args:
        build: makes the loader of views with a side of so many pixels; raises where it cannot.
        side_of: the side that an epoch's views have.
        epochs: of the run.
    """

    def __init__(self, build: Callable[[int], Loader], side_of: Callable[[int], int], epochs: int) -> None:
        self._build, self._side_of = build, side_of
        sides = {side_of(epoch) for epoch in range(epochs)}
        self._side = max(sides)  # the one that needs most memory first: what does not fit is known at once
        self._loader = build(self._side)

    def of(self, epoch: int) -> Loader:
        """The loader of an epoch; the one before it is closed where the side changes."""
        side = self._side_of(epoch)
        if side != self._side:
            state = self._loader.state_dict()
            self._loader.close()
            self._loader = self._build(side)
            self._loader.load_state_dict(state)
            self._side = side
            logger.info("views of %d pixels from epoch %d on", side, epoch)
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Of the loader in use: see `Loader.state_dict`."""
        return self._loader.state_dict()

    def identity(self) -> dict[str, Any]:
        """What must be the same on all ranks: the data, and the order in which they are taken."""
        return {name: value for name, value in self.state_dict().items() if name not in ("epoch", "next_batch")}

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Epoch and next batch; see `Loader.load_state_dict`."""
        return self._loader.load_state_dict(state)

    def close(self) -> None:
        """Close the loader in use."""
        self._loader.close()
