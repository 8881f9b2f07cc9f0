"""Linear heads of one evaluation: everything opened and checked, then trained with one seed after the other.

Legend: n training samples, B rows of a global batch, D width of the representation.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Loader
from pipelines.build import DataConfig, ImageFolder, build_loader
from train.evaluation.features import FeatureSource
from train.evaluation.linear_config import LinearConfig
from train.evaluation.linear_feeds import CachedFeed, StreamedFeed, crop_flip_recipe
from train.evaluation.linear_passes import augmented_passes
from train.evaluation.linear_probe import Feed, Head, LinearHeads, train_heads
from train.evaluation.linear_unfinished import Unfinished
from train.evaluation.representation import LayeredNetwork
from train.runtime import Ranks, choose_device, cores_per_rank, keep_freed_memory, read_ranks

PROGRESS_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedHeads:
    """What one seed gave."""

    heads: LinearHeads
    losses: list[float]
    """Mean cross-entropy over the last epoch, of each head; NaN or infinite where it has diverged."""
    unfinished: Unfinished
    """The file from which a training that was cut off goes on."""


class LinearTraining:
    """Nothing is computed before `train`.

    Args:
        config: of the evaluation.

    Attributes:
        source: checkpoint and sets.
        ranks: of this process.
        labels: of the training set, int64 [n].
        batch_size: B.

    Raises:
        ValueError: a file cannot be used, a batch does not divide, or several ranks were started for cached features.
    """

    def __init__(self, config: LinearConfig) -> None:
        self.config, self.ranks = config, read_ranks()
        if config.features == "cached" and self.ranks.world_size > 1:
            raise ValueError(
                f"`features` cached needs one process, got {self.ranks.world_size} ranks; start one, or take streamed"
            )
        self.source = FeatureSource(config)
        self.labels = torch.from_numpy(self.source.train.labels.astype(np.int64))  # its own: a file is not written to
        self.batch_size = config.batch_size_for(len(self.labels), self.ranks.world_size)
        layer = self.source.network.resolve(config.head_layers)
        self._device = choose_device(config.device, self.ranks)
        self._network: LayeredNetwork = self.source.network.with_layers([layer])

    def set_up(self) -> None:
        """Put the network on its device, and join the other ranks. All ranks must call."""
        _set_up_machine(self.ranks, self._device)
        self._network.to(self._device).to(memory_format=torch.channels_last)

    def train(self, heads: Sequence[Head], seed: int, held_out: Tensor | None) -> TrainedHeads:
        """Train all heads at once; `streamed` goes on where it was cut off. All ranks must call.

        Args:
            heads: what is trained.
            seed: of initial weights, order and crops.
            held_out: bool [n], see `train_heads`.
        """
        config = self.config
        found = LinearHeads(
            heads,
            self._width(),
            self.source.num_classes,
            momentum=config.momentum,
            init_std=config.init_std,
            seed=seed,
            device=self._device,
        )
        unfinished = Unfinished(self.source, config, self._network, heads, seed, self.batch_size)
        start_epoch, losses = unfinished.load(found) if config.features == "streamed" else (0, [])
        told = time.monotonic()

        def after_epoch(epochs: int, of_heads: list[float]) -> None:
            nonlocal told
            losses[:] = of_heads
            if self.ranks.rank != 0:
                return
            if config.features == "streamed":
                unfinished.save(found, epochs, of_heads)
            if time.monotonic() - told > PROGRESS_S or epochs == config.epochs:
                told = time.monotonic()
                lowest = min((loss for loss in of_heads if math.isfinite(loss)), default=math.inf)
                logger.info("seed %d: epoch %d of %d, lowest training loss %.4f", seed, epochs, config.epochs, lowest)

        with self._feed(seed) as feed:
            train_heads(
                found,
                feed,
                epochs=config.epochs,
                held_out=held_out,
                start_epoch=start_epoch,
                after_epoch=after_epoch,
            )
        return TrainedHeads(heads=found, losses=losses, unfinished=unfinished)

    @contextmanager
    def _feed(self, seed: int) -> Iterator[Feed]:
        config = self.config
        if config.features == "streamed":
            with closing(self._loader(seed, self.batch_size, training=True)) as loader:
                yield StreamedFeed(self._network, loader, global_batch_size=self.batch_size, chunk=config.batch_size)
            return
        if config.augmented_epochs:
            passes = augmented_passes(
                self.source,
                config,
                self._network,
                lambda: self._loader(seed, config.batch_size, training=False),
                num_passes=min(config.augmented_epochs, config.epochs),
                seed=seed,
            )
        else:
            passes = [self.source.features("train").values]
        yield CachedFeed(passes, self.labels, seed=seed, global_batch_size=self.batch_size, device=self._device)

    def _loader(self, seed: int, batch_size: int, *, training: bool) -> Loader:
        """Of this rank's random crops and flips; when not training, of the whole set in its order."""
        data = self.source.train
        return build_loader(
            DataConfig(
                path=data.path,
                global_batch_size=batch_size,
                loader="folder" if isinstance(data.data, ImageFolder) else "ffcv",
            ),
            data.data,
            crop_flip_recipe(self.source.pretraining.augment),
            seed=seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self._device,
            dtype=torch.float32,
            num_cores=cores_per_rank(self.ranks),
            training=training,
        )

    @torch.inference_mode()
    def _width(self) -> int:
        side = self.source.pretraining.augment.size
        (x,) = self._network(torch.zeros(1, 3, side, side, device=self._device))
        return int(x.shape[1])


def _set_up_machine(ranks: Ranks, device: torch.device) -> None:
    if device.type == "cpu":
        keep_freed_memory()
    if ranks.world_size > 1:
        from train.engine import init_process_group  # knows DeepSpeed, which takes seconds

        torch.set_num_threads(cores_per_rank(ranks))
        init_process_group(device)
