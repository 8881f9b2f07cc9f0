"""Some images of a set and what the encoder makes of them: at most a thousand, labelled or not.

Legend: n images of the sample, D width of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import center_recipe
from pipelines.build import Data, DataConfig, ImageFolder, Subset, build_loader, open_data, whole_of
from pipelines.manifest import ManifestError, load_manifest
from pipelines.recipe import Recipe
from pipelines.rng import key_of
from tools.report_sheet import levels_of
from train.checkpoint import load_checkpoint
from train.config import PretrainConfig, config_from_dict
from train.evaluation.exact_products import exact_products
from train.evaluation.representation import build_network
from train.runtime import choose_device, cores_per_rank, read_ranks

MOST = 1000
BATCH = 125


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The images, and h of each."""

    path: str
    data: Data
    config: PretrainConfig
    rows: NDArray[np.int64]
    """Of the set, rising: int64 [n]."""
    labels: NDArray[np.int64]
    """int64 [n]; −1: none."""
    classes: Sequence[str]
    """Names by label."""
    files: Sequence[str]
    """Names of the set's rows; empty where they are not known."""
    values: Tensor
    """h, float32 [n, D]."""

    @property
    def is_labelled(self) -> bool:
        """Whether there is something to tell apart."""
        return len(np.unique(self.labels[self.labels >= 0])) > 1

    def name(self, label: int) -> str:
        """Of a class."""
        if label < 0:
            return "no label"
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def file(self, position: int) -> str:
        """The name of an image of the sample, or its row."""
        row = int(self.rows[position])
        return self.files[row] if row < len(self.files) else f"row {row}"

    def images(self, positions: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """What the encoder sees of some images of the sample, uint8 [S, S, 3], by their place in it."""
        chosen = sorted(set(positions))
        views = Recipe(views=center_recipe(self.config.augment).views)  # without the normalisation: as pictures
        found = _views(self.path, self.data, self.rows[chosen], views, torch.device("cpu"))
        pixels = np.concatenate([levels_of(view) for view in found])
        return dict(zip(chosen, pixels, strict=True))


def draw_sample(checkpoint: Path, path: str, *, seed: int = 0) -> Sample:
    """Choose images by chance and represent them.

    Raises:
        ValueError, OSError: the checkpoint or the set cannot be used.
    """
    loaded = load_checkpoint(checkpoint)
    config = config_from_dict(loaded.config)
    network = build_network("learned", loaded, source=checkpoint).with_layers([0])
    device = choose_device("auto", read_ranks())
    data = open_data(_data_config(path))
    order = np.argsort(key_of(seed, np.arange(data.num_samples)), kind="stable")
    rows = np.sort(order[:MOST])
    network = network.to(device).to(memory_format=torch.channels_last)
    values = []
    with torch.inference_mode():
        for view in _views(path, data, rows, center_recipe(config.augment), device):
            with exact_products(device):
                values.append(network(view)[0].float().cpu())
    labels, classes, files = _told(data)
    return Sample(
        path=path,
        data=data,
        config=config,
        rows=rows,
        labels=np.full(len(rows), -1) if labels is None else labels[rows],
        classes=classes,
        files=files,
        values=torch.cat(values),
    )


def _data_config(path: str) -> DataConfig:
    is_folder = Path(path).is_dir()
    return DataConfig(path=path, loader="folder" if is_folder else "ffcv", global_batch_size=BATCH, on_error="skip")


def _views(path: str, data: Data, rows: NDArray[np.int64], recipe: Recipe, device: torch.device) -> list[Tensor]:
    """One view of each row, batch by batch, in their order."""
    few = 1 if len(rows) <= BATCH else 0  # a folder's loader starts a process for each thread asked for
    loader = build_loader(
        replace(_data_config(path), num_threads=few),
        Subset(whole_of(data), rows),
        recipe,
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        dtype=torch.float32,
        num_cores=cores_per_rank(read_ranks()),
        training=False,
    )
    with closing(loader):
        return [batch.views[0].clone() for batch in loader.epoch(0)]


def _told(data: Data) -> tuple[NDArray[np.int64] | None, Sequence[str], Sequence[str]]:
    """Labels of a whole set, int64, the names of its classes and those of its files, as far as they are known."""
    whole = whole_of(data)
    if isinstance(whole, ImageFolder):
        from torchvision.datasets.folder import find_classes

        from pipelines.folder_dataset import list_images

        listed = list_images(whole.root)
        labels = np.array([label for _, label in listed], np.int64)
        files = [str(Path(path).relative_to(whole.root)) for path, _ in listed]
        return labels, find_classes(str(whole.root))[0] if labels.max() >= 0 else [], files
    try:
        manifest = load_manifest(whole.path)
    except ManifestError:
        manifest = None
    if manifest is None:
        return whole.labels, [], []
    return whole.labels, manifest.classes or [], manifest.files
