"""The accuracy of nearest neighbours while a run is under way: `train/evaluate.py knn`, shared out among the ranks.

The encoder as it is now (its weights, not their moving average) represents every image once, in evaluation mode, in
float32, as its central square; neighbours and votes are those of `train.evaluation.knn`. Nothing of the run changes:
modes, running statistics, random generators and the training loader's position stay as they are.

Legend: M training samples, N test samples, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from model.collectives import all_gather_rows, all_reduce_sum_
from model.resnet import ResNet
from pipelines.augment import center_recipe
from pipelines.batch import Loader
from pipelines.build import DataConfig, build_loader
from train.config import PretrainConfig
from train.evaluation.exact_products import exact_products
from train.evaluation.knn import knn_predict
from train.online.neighbour_sets import LabelledSet, NeighbourSets, take_rows
from train.runtime import Ranks

logger = logging.getLogger(__name__)


def nearest_neighbours(
    encoder: ResNet,
    sets: NeighbourSets,
    config: PretrainConfig,
    *,
    ranks: Ranks,
    device: torch.device,
    num_threads: int,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Classify the test set by its neighbours in the training set. All ranks must call.

    A rank holds the representations of the whole training set, M · D float32 numbers (twice while they are gathered),
    and those of its share of the test set.

    Args:
        encoder: on the device.
        sets: from `open_neighbour_sets`.
        config: of the run.
        ranks: of this process.
        device: of this rank.
        num_threads: that decode.
        beat: called after every batch, for who watches over the run.

    Returns:
        `knn_accuracy`, the share of test samples in [0, 1]; NaN where the encoder's output is not finite. The same on
        all ranks.
    """
    chunk = config.online.knn_batch_size

    def represent(labelled: LabelledSet) -> tuple[Tensor, Tensor]:
        own = take_rows(labelled, labelled.rows_of_rank(ranks.rank, ranks.world_size, chunk))
        labels = torch.tensor(own.labels, device=device)
        if len(labels) == 0:
            return torch.empty(0, encoder.feature_dim, device=device), labels
        with closing(_loader(own, config, device, num_threads)) as loader:
            return _represent(encoder, loader, beat), labels

    with torch.no_grad(), _evaluation_mode(encoder):
        train_x = _gather(represent(sets.train)[0], sets.train, ranks, chunk)
        test_x, test_y = represent(sets.test)
    num_bad = sum(int((~values.isfinite()).sum()) for values in (train_x, test_x))
    num_correct = 0
    if len(test_x) > 0 and num_bad == 0:
        train_y = torch.tensor(sets.train.labels, device=device)
        predicted = knn_predict(train_x, train_y, test_x, k=config.online.knn_neighbours)
        num_correct = int((predicted == test_y).sum())
        beat()
    total = all_reduce_sum_(torch.tensor([num_correct, num_bad], dtype=torch.int64, device=device)).tolist()
    if total[1]:
        logger.warning("nearest neighbours were not measured: the encoder's output is not finite")
        return {"knn_accuracy": math.nan}
    return {"knn_accuracy": total[0] / len(sets.test.labels)}


def _represent(encoder: nn.Module, loader: Loader, beat: Callable[[], None]) -> Tensor:
    """[n, D], float32, on the device."""
    values = []
    for batch in loader.epoch(0):
        # Past whatever stands in for the network's `forward` in training: a compiled one would be compiled again.
        with exact_products(batch.views[0].device):
            values.append(type(encoder).forward(encoder, batch.views[0]).float())
        beat()
    return torch.cat(values)


def _gather(own: Tensor, labelled: LabelledSet, ranks: Ranks, chunk: int) -> Tensor:
    """The representations of the whole set, in its order, on every rank: neighbours that tie count by position."""
    rows = [labelled.rows_of_rank(rank, ranks.world_size, chunk) for rank in range(ranks.world_size)]
    most = max(len(of_rank) for of_rank in rows)
    padded = own.new_zeros(most, own.shape[1])
    padded[: len(own)] = own
    gathered = all_gather_rows(padded).view(len(rows), most, -1)
    whole = own.new_empty(len(labelled.labels), own.shape[1])
    for of_rank, values in zip(rows, gathered, strict=True):
        whole[torch.from_numpy(of_rank).to(own.device)] = values[: len(of_rank)]
    return whole


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in its own."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _loader(labelled: LabelledSet, config: PretrainConfig, device: torch.device, num_threads: int) -> Loader:
    """Every sample once, in order, as a central view."""
    return build_loader(
        DataConfig(
            path=str(labelled.beton.path),
            global_batch_size=config.online.knn_batch_size,
            on_error=config.data.on_error,
        ),
        labelled.beton,
        center_recipe(config.augment),
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        dtype=torch.float32,
        num_cores=num_threads,
        training=False,
    )
