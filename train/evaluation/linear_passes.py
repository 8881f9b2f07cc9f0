"""Representations of a training set under random crops and flips, a pass over the set at a time, kept on disk.

They lie beside those of central views, in files of the same kind; the views of pass k are those that training with the
same seed draws in epoch k.

Legend: n samples, D width, K passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pipelines.batch import Loader
from train.evaluation.checks import check_finite
from train.evaluation.extractor import FEATURES_VERSION
from train.evaluation.feature_cache import FeatureWriter, cache_path, read_features
from train.evaluation.features import FeatureSource
from train.evaluation.linear_feeds import crop_flip_recipe
from train.evaluation.protocol import EvaluationConfig
from train.evaluation.representation import LayeredNetwork
from train.evaluation.results import sha256_of
from train.initial_encoder import results_dir


def augmented_passes(
    source: FeatureSource,
    config: EvaluationConfig,
    network: LayeredNetwork,
    loader_of: Callable[[], Loader],
    *,
    num_passes: int,
    seed: int,
) -> list[Tensor]:
    """K representations of the training set, float32 [n, D] each, on the CPU; from the cache where it has them.

    Args:
        source: of the checkpoint and the set.
        config: says whether there is a cache, and what the network is.
        network: in evaluation mode; its first output is taken.
        loader_of: makes a loader of augmented views, on the network's device, in the order of the set.
        num_passes: K.
        seed: of the views.

    Raises:
        ValueError: a representation is not finite, or the cache holds something foreign.
        OSError: the cache cannot be written.
    """
    folder = results_dir(source.path) / "evaluation" / "features"
    common = identity_of_views(source, config, network) | {"seed": seed, "version": FEATURES_VERSION}
    passes = []
    for epoch in range(num_passes):
        key = common | {"epoch": epoch}
        path = cache_path(folder, key)
        kept = read_features(path, key) if config.cache else None
        if kept is not None:
            passes.append(kept[0])
            continue
        with ExitStack() as stack:
            loader = stack.enter_context(closing(loader_of()))
            pieces = _pieces(network, loader, epoch)
            if not config.cache:
                passes.append(torch.cat(list(pieces)))
                continue
            writer = stack.enter_context(FeatureWriter(path, key, source.train.labels))
            for piece in pieces:
                writer.append(piece)
            passes.append(writer.finish()[0])
    return passes


def identity_of_views(source: FeatureSource, config: EvaluationConfig, network: LayeredNetwork) -> dict[str, Any]:
    """Tells what is seen of the training set, and through which network, apart from anything else; JSON values."""
    return {
        "checkpoint_sha256": sha256_of(source.path),
        "weights": config.weights,
        "representation": config.representation,
        "head_layers": network.layers[0],
        "data": source.train.identity,
        # As it is in a file, where tuples are lists.
        "recipe": json.loads(json.dumps(asdict(crop_flip_recipe(source.pretraining.augment)))),
    }


@torch.inference_mode()
def _pieces(network: LayeredNetwork, loader: Loader, epoch: int) -> Iterator[Tensor]:
    row = 0
    for batch in loader.epoch(epoch):
        x = network(batch.views[0])[0].float().cpu()
        check_finite(x, "training", first_row=row)
        row += len(x)
        yield x
