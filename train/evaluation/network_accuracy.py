"""The accuracy of a classifier network that a run trained, encoder and all, on a labelled set.

Every image is seen once, as its central square, resized and normalised as in training; the network is in evaluation
mode, in float32. Ranks share the set out among them, and all of them get the figures of the whole.

Legend: n samples that are measured on, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from model.build import build_method
from model.collectives import all_reduce_sum_
from model.methods.base import Method
from model.methods.supervised import Supervised
from pipelines.augment import center_recipe
from pipelines.batch import Loader
from pipelines.build import DataConfig, ImageFolder, Subset, build_loader
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import PretrainConfig, config_from_dict
from train.evaluation.classification import ClassificationMetrics, measure
from train.evaluation.exact_products import exact_products
from train.evaluation.labelled_data import LabelledData
from train.initial_encoder import check_fits
from train.runtime import Ranks, choose_device, cores_per_rank, read_ranks


def network_accuracy(
    run_dir: Path,
    data: LabelledData,
    *,
    num_classes: int,
    classes: Sequence[str] | None = None,
    batch_size: int,
    rows: NDArray[np.int64] | None = None,
) -> ClassificationMetrics:
    """Measure the last checkpoint of a run. All ranks must call, with a process group where there are several.

    Args:
        run_dir: of a run of the method `supervised` or `distill`.
        data: what is measured on.
        num_classes: C.
        classes: names by label.
        batch_size: images that go through the network at a time, over all ranks.
        rows: int64, rising: those that are measured on; None: all.

    Raises:
        ValueError: the run has no checkpoint, or one of another network; or an image cannot be decoded.
    """
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still have been writing the checkpoint when another one was done
    network, config = load_network(run_dir)
    ranks = read_ranks()
    device = choose_device(config.train.device, ranks)
    labels = torch.from_numpy(data.labels.copy() if rows is None else data.labels[rows])
    with closing(_loader(config, data, rows, batch_size, ranks, device)) as loader:
        scores = network_scores(network.to(device), loader, len(labels), num_classes, device, rows=rows)
    return measure(scores.cpu(), labels, num_classes, classes)


def load_network(run_dir: Path) -> tuple[Supervised, PretrainConfig]:
    """The classifier network of a run's last checkpoint, in evaluation mode on the CPU, and the run's configuration.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or its method classifies nothing.
    """
    path = latest_checkpoint(run_dir)
    if path is None:
        raise ValueError(f"there is no checkpoint in {run_dir}/checkpoints; train first")
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint.config)
    with torch.device("meta"):
        method: Method = build_method(config.model, config.seed)
    if not isinstance(method, Supervised):
        raise ValueError(f"{path} must be of a run of supervised or distill, got {config.model.method}")
    check_fits(checkpoint.model, method.state_dict(), path, "its configuration is of another network")
    method.load_state_dict(checkpoint.model, assign=True)
    return method.eval(), config


@torch.inference_mode()
def network_scores(
    network: Supervised,
    loader: Loader,
    num_samples: int,
    num_classes: int,
    device: torch.device,
    *,
    rows: NDArray[np.int64] | None = None,
) -> Tensor:
    """The logits of every sample, float32 [n, C] on the device, the same on all ranks, which must all call.

    Args:
        network: on the device, in evaluation mode.
        loader: of this rank's share of every batch; one view.
        num_samples: n.
        num_classes: C.
        device: of the network.
        rows: that the samples are of their set, rising; None: from 0 to n − 1.
    """
    scores = torch.zeros(num_samples, num_classes, device=device)
    network.to(memory_format=torch.channels_last)
    for batch in loader.epoch(0):
        if batch.num_images == 0:  # fewer images are left than there are ranks
            continue
        samples = batch.sample_indices.numpy()
        places = torch.from_numpy(samples if rows is None else np.searchsorted(rows, samples))
        with exact_products(device):
            scores[places.to(device)] = network.logits(batch.views[0]).float()
    return all_reduce_sum_(scores)


def _loader(
    config: PretrainConfig,
    data: LabelledData,
    rows: NDArray[np.int64] | None,
    batch_size: int,
    ranks: Ranks,
    device: torch.device,
) -> Loader:
    """Every image of the rows once, in order, as a central view."""
    kind: Literal["folder", "ffcv"] = "folder" if isinstance(data.data, ImageFolder) else "ffcv"
    return build_loader(
        DataConfig(path=data.path, global_batch_size=batch_size, loader=kind),
        data.data if rows is None else Subset(data.data, rows),
        center_recipe(config.augment),
        seed=0,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        dtype=torch.float32,
        num_cores=config.data.num_threads or cores_per_rank(ranks),
        training=False,
    )
