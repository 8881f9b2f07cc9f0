"""From a configuration to a loader."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import Loader, MissingPackage
from pipelines.beton import Beton, open_beton
from pipelines.ffcv_loader import FFCVLoader, Geometry
from pipelines.manifest import load_manifest
from pipelines.recipe import Recipe
from pipelines.subset import SubsetConfig, choose_rows

__all__ = [
    "Data",
    "DataConfig",
    "ImageFolder",
    "MissingPackage",
    "Subset",
    "build_loader",
    "check_batch_size",
    "open_data",
    "whole_of",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how it is read."""

    path: str
    """The `.beton` file, made by `python -m tools.convert`, or the `.shards.json` of a set in several; under `loader:
    folder` a folder of images."""
    subset: SubsetConfig = SubsetConfig()
    """Which of its images are used; by default all."""
    labelled: SubsetConfig = SubsetConfig()
    """Which of its images keep their label; the others have −1, as if there were none. By default all."""
    global_batch_size: int = 256
    """Images (not views) in one optimizer step, over all ranks."""
    loader: Literal["ffcv", "dali", "resident", "folder"] = "ffcv"
    """`ffcv`: decodes on the CPU, on threads of its own. `dali`: decodes with NVIDIA DALI, on the GPU if there is one.
    `resident`: keeps the whole set decoded on the device. `folder`: torchvision's way, to try without converting."""
    photometric: Literal["ours", "dali"] = "ours"
    """Under `loader: dali`: whose colour operations; DALI's have a fixed order and hues of their own."""
    geometry: Geometry = "auto"
    """Under `loader: ffcv`: where crops are cut and resized; `auto`: on the GPU if the file is raw, else on the CPU."""
    scaled_decode: bool = True
    """Under `loader: ffcv`: decode JPEGs at half or quarter scale where no crop becomes smaller than its view."""
    num_threads: int = 0
    """Decoding threads of each rank; 0: the rank's share of the machine's cores."""
    batches_ahead: int = 2
    """Batches in the making while one is in use."""
    on_error: Literal["raise", "skip"] = "raise"
    """A sample that cannot be decoded stops the run, or is named, counted and replaced by its neighbour."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ValueError(f"`data.global_batch_size` must be at least 1, got {self.global_batch_size}")
        if self.num_threads < 0:
            raise ValueError(f"`data.num_threads` must be 0 (the rank's cores) or more, got {self.num_threads}")
        if self.photometric == "dali" and self.loader != "dali":
            raise ValueError(f"`data.photometric` dali needs `data.loader` dali, got {self.loader}")
        if self.geometry != "auto" and self.loader != "ffcv":
            raise ValueError(f"`data.geometry` {self.geometry} needs `data.loader` ffcv, got {self.loader}")
        if self.batches_ahead < 1:
            raise ValueError(f"`data.batches_ahead` must be at least 1, got {self.batches_ahead}")


class ImageFolder(NamedTuple):
    """A plain folder of images."""

    root: Path
    num_samples: int
    labels: NDArray[np.int64] | None = None
    """int64 [n], where they are others than those of the class folders."""


class Subset(NamedTuple):
    """Some of the images of a set; they keep their row numbers."""

    whole: Beton | ImageFolder
    rows: NDArray[np.int64]
    """Rising."""

    @property
    def num_samples(self) -> int:
        """Images that are used."""
        return len(self.rows)


Data = Beton | ImageFolder | Subset


def whole_of(data: Data) -> Beton | ImageFolder:
    """The set that `data` is, or is a part of."""
    return data.whole if isinstance(data, Subset) else data


def open_data(config: DataConfig) -> Data:
    """What `config.path` names, or as much of it as `config.subset` asks for; nothing is decoded.

    Raises:
        ValueError: it is no sound `.beton`, or no folder of images, as the loader wants it; or has no such subset.
        OSError: likewise.
    """
    whole = _open_whole(config)
    rows = None if config.subset.is_whole else _rows(config.subset, whole)
    if not config.labelled.is_whole:
        whole = _keep_labels(whole, _rows(config.labelled, whole))
    return whole if rows is None else Subset(whole, rows)


def _keep_labels(whole: Beton | ImageFolder, rows: NDArray[np.int64]) -> Beton | ImageFolder:
    """The same images, of which those of other rows have the label −1."""
    theirs = whole.labels
    if isinstance(whole, ImageFolder):
        from pipelines.folder_dataset import list_images

        theirs = np.array([label for _, label in list_images(whole.root)], np.int64)
    labels = np.full(whole.num_samples, -1)
    if theirs is not None:
        labels[rows] = theirs[rows]
    return whole._replace(labels=labels) if isinstance(whole, ImageFolder) else replace(whole, labels=labels)


def _rows(subset: SubsetConfig, whole: Beton | ImageFolder) -> NDArray[np.int64]:
    """The rows of a set that a subset of it has."""
    if isinstance(whole, ImageFolder):
        from pipelines.folder_dataset import list_images

        images = list_images(whole.root)
        files = [Path(file).relative_to(whole.root).as_posix() for file, _ in images]
        labels = np.array([label for _, label in images], np.int64)
        return choose_rows(subset, labels, files, len(images))
    manifest = load_manifest(whole.path) if subset.list is not None else None
    return choose_rows(subset, whole.labels, manifest.files if manifest else None, whole.num_samples)


def _open_whole(config: DataConfig) -> Beton | ImageFolder:
    if config.loader != "folder":
        if Path(config.path).is_dir():
            raise ValueError(
                f"`data.path` must be a .beton, {config.path} is a folder; convert it with "
                "`python -m tools.convert`, or set `data.loader` to folder"
            )
        return open_beton(config.path)
    from pipelines.folder_dataset import list_images

    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"`data.path` must be a folder of images under `data.loader` folder, got {root}")
    return ImageFolder(root, len(list_images(root)))


def build_loader(
    config: DataConfig,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    num_cores: int,
    training: bool = True,
) -> Loader:
    """The loader that `config` asks for.

    Args:
        config: the run's.
        data: from `open_data`; which of its rows are used, it says itself.
        recipe: of the views.
        seed: of the order and of every view.
        rank: of this process.
        world_size: number of ranks.
        device: where views go.
        dtype: of the views.
        num_cores: this rank's share of the machine, for `num_threads: 0`.
        training: shuffle and drop the last partial global batch; else keep the file's order and every image.

    Raises:
        ValueError: when training, the batch does not divide among the ranks, or there are fewer images than in one.
    """
    if training:
        check_batch_size(config.global_batch_size, world_size, data.num_samples)
    num_threads = config.num_threads or num_cores
    common: dict[str, Any] = {
        "seed": seed,
        "global_batch_size": config.global_batch_size,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "dtype": dtype,
        "training": training,
        "on_error": config.on_error,
        "rows": data.rows if isinstance(data, Subset) else None,
    }
    whole = whole_of(data)
    ahead = config.batches_ahead
    # A loader's module is imported when it is asked for: what the others stand on takes seconds.
    if isinstance(whole, ImageFolder):
        from pipelines.folder_loader import FolderLoader

        return FolderLoader(
            whole.root, recipe, labels=whole.labels, num_workers=num_threads, batches_ahead=ahead, **common
        )
    if config.loader == "resident":
        from pipelines.resident_loader import ResidentLoader

        return ResidentLoader(whole, recipe, num_threads=num_threads, **common)
    if config.loader == "dali":
        from pipelines.dali_loader import DALILoader

        return DALILoader(
            whole, recipe, num_threads=num_threads, batches_ahead=ahead, photometric=config.photometric, **common
        )
    return FFCVLoader(
        whole,
        recipe,
        num_threads=num_threads,
        batches_ahead=ahead,
        geometry=config.geometry,
        scaled_decode=config.scaled_decode,
        **common,
    )


def check_batch_size(global_batch_size: int, world_size: int, num_samples: int) -> None:
    """Refuse a training batch that the ranks cannot share equally, or that `num_samples` images cannot fill once.

    Raises:
        ValueError: with the nearest sizes that would do.
    """
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        near = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ValueError(
            f"`data.global_batch_size` must be divisible by world size {world_size}, got {global_batch_size}; "
            f"use {near}"
        )
    if global_batch_size > num_samples:
        raise ValueError(
            f"`data.global_batch_size` must not exceed the {num_samples} images that are trained on, got "
            f"{global_batch_size}; use a smaller batch"
        )
