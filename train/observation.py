"""What watches the encoder while it trains: the linear probe, nearest neighbours, signs of collapse.

Nothing here has a say in what is learned: representations are taken detached, and a run with all of it is, bit for bit,
the run without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.methods.base import Method
from pipelines.batch import Batch
from train.config import PretrainConfig
from train.online.collapse import CollapseWatch
from train.online.linear_probe import LinearProbe
from train.online.nearest import nearest_neighbours
from train.online.neighbour_sets import NeighbourSets
from train.online.representation_tap import RepresentationTap
from train.runtime import Ranks, cores_per_rank


class Observation:
    """Of one run.

    Args:
        config: the run's.
        method: what is trained, on the device.
        ranks: of this process.
        device: of this rank.
        num_classes: of the linear probe; None: there is none.
        neighbours: the sets of nearest neighbours; None: they are not measured.
        warmup_steps: before which the signs of collapse mean nothing.
    """

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        ranks: Ranks,
        device: torch.device,
        *,
        num_classes: int | None,
        neighbours: NeighbourSets | None,
        warmup_steps: int,
    ) -> None:
        online = config.online
        self._config, self._method, self._ranks, self._device = config, method, ranks, device
        self._neighbours = neighbours
        self._probe: LinearProbe | None = None
        if num_classes is not None:
            width = method.encoder.feature_dim
            self._probe = LinearProbe(
                width, num_classes, lr=online.probe_lr, momentum=online.probe_momentum, device=device
            )
        self._collapse = CollapseWatch(warmup_steps=warmup_steps) if online.watch_collapse else None
        listens = self._probe is not None or self._collapse is not None
        self._tap = RepresentationTap(method.encoder) if listens else None
        self._representations: list[Tensor] = []  # of the last step

    def after_step(self, batch: Batch) -> dict[str, Tensor]:
        """Metrics of one step, on the device. All ranks must call; nobody waits for a device."""
        self._representations = [] if self._tap is None else self._tap.take()
        return {} if self._probe is None else self._probe.step(self._representations, batch.labels)

    def measure(self, projections: list[Tensor], *, step: int) -> dict[str, float]:
        """Metrics of the last step that cost something. All ranks must call; waits for the device."""
        if self._collapse is None:
            return {}
        return self._collapse.measure(self._representations, projections, step=step)

    def evaluates_after(self, epoch: int) -> bool:
        """Whether `after_epoch` has something to do."""
        return self._neighbours is not None and (epoch + 1) % self._config.online.knn_every_epochs == 0

    def after_epoch(self, epoch: int, *, beat: Callable[[], None]) -> dict[str, float]:
        """Metrics at the end of an epoch, from 0. All ranks must call; `beat` is called now and then."""
        if not self.evaluates_after(epoch):
            return {}
        assert self._neighbours is not None
        return nearest_neighbours(
            self._method.encoder,
            self._neighbours,
            self._config,
            ranks=self._ranks,
            device=self._device,
            num_threads=self._config.data.num_threads or cores_per_rank(self._ranks),
            beat=beat,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a resume; empty without a probe."""
        return {} if self._probe is None else self._probe.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict()`; a probe that the run did not have before starts anew.

        Raises:
            ValueError: the probe was of other labels or another encoder.
        """
        if self._probe is not None and state:
            self._probe.load_state_dict(state)
