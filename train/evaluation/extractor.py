"""From images to representations: one pass over a set for all layers, kept on disk.

Every image is seen once, as its central square resized to the side that the encoder was trained on, normalised as in
training; the network is in evaluation mode, in float32. Several layers of the projection head come out of one pass.

Legend: n samples, D width of the representation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipelines.augment import center_recipe
from pipelines.batch import Loader
from pipelines.build import DataConfig, ImageFolder, build_loader
from train.checkpoint import load_checkpoint
from train.checkpoint_file import bytes_of
from train.config import PretrainConfig, config_from_dict
from train.evaluation.checks import check_finite
from train.evaluation.exact_products import exact_products
from train.evaluation.feature_cache import FeatureWriter, Key, cache_path, read_features
from train.evaluation.labelled_data import LabelledData
from train.evaluation.protocol import Representation
from train.evaluation.representation import LayeredNetwork, Network, build_network
from train.initial_encoder import Weights, Which, find_checkpoint, results_dir
from train.runtime import choose_device, cores_per_rank, keep_freed_memory, read_ranks

FEATURES_VERSION = 1  # of what this module computes: raise it where its figures change
PROGRESS_S = 30.0
SPLIT_NAMES = {"train": "training", "test": "test", "all": "the"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Whose representations, and how they are computed."""

    checkpoint: str
    """A checkpoint of a run or of `tools.import_checkpoint`, or a run directory, in which `which` chooses."""
    which: Which = "latest"
    """Of a run directory: the latest checkpoint, or the best by `train.keep_best` (by the loss, where that is none)."""
    weights: Weights = "live"
    """Of the checkpoint: those of the last step, or their moving average (`train.ema_decay`)."""
    representation: Representation = "learned"
    """`learned`; `random`: the network that the run started from; `pixels`: none at all."""
    batch_size: int = 256
    """Images that go through the encoder at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    cache: bool = True
    """Keep representations in `evaluation/features/` of the run directory, for whoever asks for the same ones next."""


class Extractor:
    """A checkpoint's network; nothing is computed yet.

    Attributes:
        path: the checkpoint's file.
        pretraining: the configuration that it was trained with.
        network: encoder and head.

    Raises:
        ValueError: the checkpoint cannot be used.
        OSError: likewise.
    """

    def __init__(self, config: ExtractorConfig) -> None:
        self._config = config
        self.path = find_checkpoint(Path(config.checkpoint), config.which)
        checkpoint = load_checkpoint(self.path)
        self.pretraining: PretrainConfig = config_from_dict(checkpoint.config)
        self.network: Network = build_network(
            config.representation, checkpoint, weights=config.weights, source=self.path
        )
        self._digests: dict[int, str] = {}

    def representations(self, data: LabelledData, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Representations of a set after so many layers of the projection head each, from one pass at most.

        Args:
            data: the set; its labels may be missing.
            layers: 0 gives h, −1 the whole head's output z; each once.

        Returns:
            By entry of `layers`: values, float32 [n, D], and labels, int64 [n], on the CPU; from the cache private maps
            of its file.

        Raises:
            ValueError: the head has not as many layers, or a representation is not finite.
            OSError: the cache cannot be written.
        """
        resolved = {layer: self.network.resolve(layer) for layer in layers}
        wanted = sorted(set(resolved.values()))
        keys = {layer: self._key(data, layer) for layer in wanted}
        paths = {layer: cache_path(self._cache_folder, key) for layer, key in keys.items()}
        found = {}
        if self._config.cache:
            found = {
                layer: tensors for layer in wanted if (tensors := read_features(paths[layer], keys[layer])) is not None
            }
        missing = [layer for layer in wanted if layer not in found]
        if missing:
            found |= self._compute(data, {layer: (paths[layer], keys[layer]) for layer in missing})
        return {layer: found[k] for layer, k in resolved.items()}

    @property
    def _cache_folder(self) -> Path:
        return results_dir(self.path) / "evaluation" / "features"

    def _compute(self, data: LabelledData, wanted: dict[int, tuple[Path, Key]]) -> dict[int, tuple[Tensor, Tensor]]:
        with ExitStack() as stack:
            sinks: list[FeatureWriter | _Memory] = [
                stack.enter_context(FeatureWriter(path, key, data.labels)) if self._config.cache else _Memory(data)
                for path, key in wanted.values()
            ]
            device, num_cores = _machine(self._config)
            network = self.network.with_layers(list(wanted)).to(device).to(memory_format=torch.channels_last)
            loader = center_loader(data, self.pretraining, self._config.batch_size, device, num_cores)
            stack.enter_context(closing(loader))
            for values in _forward(network, loader, data):
                for sink, value in zip(sinks, values, strict=True):
                    sink.append(value)
            return {layer: sink.finish() for layer, sink in zip(wanted, sinks, strict=True)}

    def _key(self, data: LabelledData, layer: int) -> Key:
        """All that the features depend on."""
        recipe = asdict(center_recipe(self.pretraining.augment))
        key: Key = {
            "network": self._network_digest(layer),
            "representation": self._config.representation,
            "head_layers": layer,
            "data": data.identity,
            "recipe": json.loads(json.dumps(recipe)),  # tuples become lists, as in the file
            "version": FEATURES_VERSION,
        }
        return key

    def _network_digest(self, layer: int) -> str:
        """Of the weights that take part."""
        if layer not in self._digests:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.network.with_layers([layer]).state_dict().items()):
                digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
                digest.update(bytes_of(tensor))
            self._digests[layer] = digest.hexdigest()
        return self._digests[layer]


class _Memory:
    """Collects features in memory."""

    def __init__(self, data: LabelledData) -> None:
        self._labels = torch.from_numpy(data.labels)
        self._values: Tensor | None = None
        self._row = 0

    def append(self, values: Tensor) -> None:
        if self._values is None:
            self._values = torch.empty(len(self._labels), values.shape[1])
        self._values[self._row : self._row + len(values)] = values
        self._row += len(values)

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._values is not None
        return self._values, self._labels


@torch.inference_mode()
def _forward(network: LayeredNetwork, loader: Loader, data: LabelledData) -> Iterator[list[Tensor]]:
    """The representations of each batch, float32 on the CPU, in the order of the set."""
    row, told = 0, time.monotonic()
    for batch in loader.epoch(0):
        with exact_products(batch.views[0].device):
            values = [value.float().cpu() for value in network(batch.views[0])]
        for value in values:
            check_finite(value, SPLIT_NAMES[data.split], first_row=row)
        row += batch.num_images
        yield values
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            logger.info("%s: %d of %d images represented", data.path, row, len(data.labels))


def center_loader(
    data: LabelledData, config: PretrainConfig, batch_size: int, device: torch.device, num_cores: int
) -> Loader:
    """Every image of a set once, in its order, as a central view."""
    return build_loader(
        DataConfig(
            path=data.path,
            global_batch_size=batch_size,
            loader="folder" if isinstance(data.data, ImageFolder) else "ffcv",
        ),
        data.data,
        center_recipe(config.augment),
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        dtype=torch.float32,
        num_cores=num_cores,
        training=False,
    )


def _machine(config: ExtractorConfig) -> tuple[torch.device, int]:
    """Where to compute, and threads for decoding."""
    ranks = read_ranks()
    device = choose_device(config.device, ranks)
    if device.type == "cpu":
        keep_freed_memory()
    return device, cores_per_rank(ranks)
