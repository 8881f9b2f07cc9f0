"""What loaders yield, and what every loader can do.

Legend: N local images, V views, H×W pixels of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        views: V tensors [N, 3, H, W], channels_last, normalised, on the device, in the compute dtype.
        labels: int64 [N] on the device; −1 where the `.beton` holds none.
        sample_indices: int64 [N] on the CPU; the rows of the `.beton`.
        epoch: in which the parameters of these views were drawn.
    """

    views: list[Tensor]
    labels: Tensor
    sample_indices: Tensor
    epoch: int

    @property
    def num_images(self) -> int:
        """Source images, not views."""
        return len(self.sample_indices)


class MissingPackage(RuntimeError):
    """A loader was asked for whose package is not there; one line says what to install."""


class Loader(Protocol):
    """Yields the batches of an epoch, from any of them on.

    A loader knows its position, so that a checkpoint taken between two batches can be resumed with the next one.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_batch` on; the views do not depend on where it starts."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, and what makes a resumed run the same one."""

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Check that the state is of this data and order, and return its position: epoch and next batch."""

    def close(self) -> None:
        """Stop the threads and free their memory."""
