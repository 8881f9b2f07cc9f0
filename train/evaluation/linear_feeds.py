"""Where linear heads get their rows from: the frozen network, anew in every epoch, or representations that are kept.

Both shuffle by `order(seed, epoch)` and drop the last partial batch, as training does: with the same seed they visit
the same images in the same batches.

Legend: n samples of the set, N rows of a rank's batch, D width, K passes over the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipelines.augment import AugmentConfig, supervised_view
from pipelines.batch import Loader
from pipelines.order import epoch_order, num_global_batches
from pipelines.recipe import Recipe
from train.evaluation.exact_products import exact_products
from train.evaluation.linear_probe import Rows
from train.evaluation.representation import LayeredNetwork


def crop_flip_recipe(config: AugmentConfig) -> Recipe:
    """One view of random crop and flip alone, with the run's side, filter, ranges and normalisation."""
    return Recipe(views=(supervised_view(config),), mean=config.mean, std=config.std)


class StreamedFeed:
    """Augmented views of every epoch, through the frozen network. Implements `linear_probe.Feed`, on any ranks.

    Args:
        network: in evaluation mode, on the device; its first output is taken.
        loader: of this rank's views; its first view is taken.
        global_batch_size: images over all ranks.
        chunk: images that go through the network at a time.
    """

    def __init__(self, network: LayeredNetwork, loader: Loader, *, global_batch_size: int, chunk: int) -> None:
        self._network, self._loader, self._chunk = network, loader, chunk
        self.global_batch_size = global_batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """The batches of one epoch.

        Raises:
            ValueError: in the first one: a representation is not finite.
        """
        for batch in self._loader.epoch(epoch):
            with torch.inference_mode(), exact_products(batch.views[0].device):
                x = torch.cat([self._network(views)[0].float() for views in torch.split(batch.views[0], self._chunk)])
            if epoch == 0:
                _check_finite(x, batch.sample_indices)
            yield Rows(x=x, labels=batch.labels, indices=batch.sample_indices)


class CachedFeed:
    """Representations that lie in memory or in a map of a file; epoch e takes pass e mod K. In one process.

    Args:
        passes: K times float32 [n, D], on the CPU: of the same samples, in their order.
        labels: int64 [n].
        seed: of the order.
        global_batch_size: rows of a batch.
        device: where rows go.
    """

    def __init__(
        self, passes: Sequence[Tensor], labels: Tensor, *, seed: int, global_batch_size: int, device: torch.device
    ) -> None:
        self._passes, self._labels, self._seed, self._device = passes, labels, seed, device
        self.global_batch_size = global_batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return num_global_batches(len(self._labels), self.global_batch_size, drop_last=True)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """The batches of one epoch."""
        values = self._passes[epoch % len(self._passes)]
        order = torch.from_numpy(epoch_order(self._seed, epoch, len(self._labels)))
        for batch in range(len(self)):
            rows = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]
            yield Rows(x=values[rows].to(self._device), labels=self._labels[rows].to(self._device), indices=rows)


def _check_finite(x: Tensor, indices: Tensor) -> None:
    finite = x.isfinite().all(dim=1).cpu()
    if not bool(finite.all()):
        raise ValueError(
            f"training features must be finite, got NaN or infinity for sample {int(indices[~finite][0])}; the encoder "
            "has diverged"
        )
