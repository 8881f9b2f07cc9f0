"""What pictures of representations are made from: h and z of a labelled set, and the images themselves.

Representations come from the cache that all evaluations share (`train.evaluation.features`); one pass over the images
gives both.

Legend: n images, D width of h, E width of z, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.beton import Beton
from pipelines.folder_dataset import list_images
from pipelines.subset import balanced_subset
from tools.preview import stored_pixels
from train.checkpoint import Checkpoint, load_checkpoint
from train.evaluation.features import Features, FeatureSource
from train.evaluation.protocol import EvaluationConfig
from train.evaluation.representation import Network
from train.initial_encoder import Weights, Which, results_dir

H, Z = 0, -1  # layers of the projection head
MOST_SHOWN = 2000  # images, unless more are asked for
MAX_CLASSES = 20  # with a colour and a mark of their own; their names still fit into a legend


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is shown, and where the picture is written."""

    checkpoint: str
    """A checkpoint of a run or of `tools.import_checkpoint`, or a run directory, in which `which` chooses."""
    test_data: str
    """The labelled set that is shown: a `.beton`, or a folder with one folder for each class."""
    which: Which = "latest"
    """Of a run directory: the latest checkpoint, or the best by `train.keep_best`."""
    weights: Weights = "live"
    """Of the checkpoint: those of the last step, or their moving average (`train.ema_decay`)."""
    batch_size: int = 256
    """Images that go through the encoder at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    cache: bool = True
    """Keep representations in `evaluation/features/` of the run directory."""
    seed: int = 0
    """Of whatever is drawn by chance; the same seed gives the same picture."""
    out: str | None = None
    """A folder; by default `pictures/` in the run directory, or in a folder named as a checkpoint that is in none."""

    @property
    def train_data_used(self) -> str:
        """What labels are learned from; the set itself, where nothing is learned."""
        return self.test_data


class Source:
    """A checkpoint and its sets, opened."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._features = FeatureSource(
            EvaluationConfig(
                checkpoint=config.checkpoint,
                train_data=config.train_data_used,
                test_data=config.test_data,
                which=config.which,
                weights=config.weights,
                batch_size=config.batch_size,
                device=config.device,
                seed=config.seed,
                cache=config.cache,
            )
        )
        self.path = self._features.path
        self.labels: NDArray[np.int64] = self._features.test.labels
        self.num_classes = self._features.num_classes
        self.names = self._features.classes or [f"class {label}" for label in range(self.num_classes)]
        if len(np.unique(self.labels)) < 2:
            raise ValueError(f"`test_data` must have at least two classes to compare, got one in {config.test_data}")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """All that the file holds."""
        return load_checkpoint(self.path)

    @cached_property
    def _files(self) -> list[str]:
        """Of a folder, in torchvision's order."""
        return [file for file, _ in list_images(Path(self._config.test_data))]

    @property
    def folder(self) -> Path:
        """Where pictures of this checkpoint are put."""
        return folder_of(self._config, self.path)

    @property
    def network(self) -> Network:
        """Encoder and head."""
        return self._features.network

    def both(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Representations [n, D] and projections [n, E] of the set that is shown."""
        check_head(self.network)
        found = self._features.representations("test", (H, Z))
        return found[H].values.numpy(), found[Z].values.numpy()

    def features(self, split: Literal["train", "test"], layer: int = H) -> Features:
        """One representation of one set."""
        if layer != H:
            check_head(self.network)
        return self._features.representations(split, (layer,))[layer]

    def image(self, row: int) -> Image.Image:
        """What the encoder sees of an image, before it is resized: its largest central square."""
        data = self._features.test.data
        if isinstance(data, Beton):
            picture = Image.fromarray(stored_pixels(data, row))
        else:
            with Image.open(self._files[row]) as opened:
                picture = opened.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    def about(self) -> dict[str, Any]:
        """See `about`."""
        return about(self._config, self.path, self.checkpoint)

    def words(self) -> str:
        """See `words`."""
        return words(self._config, self.path, self.checkpoint)


def folder_of(config: SourceConfig, path: Path) -> Path:
    """Where pictures of a checkpoint are put."""
    return Path(config.out) if config.out else results_dir(path) / "pictures"


def about(config: SourceConfig, path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What every picture's numbers begin with."""
    return {
        "checkpoint": str(path),
        "step": checkpoint.position.get("step"),
        "weights": config.weights,
        "test_data": config.test_data or None,
        "seed": config.seed,
    }


def words(config: SourceConfig, path: Path, checkpoint: Checkpoint) -> str:
    """The same in a few words, for below the picture."""
    step = checkpoint.position.get("step")
    average = ", moving average of the weights" * (config.weights == "average")
    data = f"; {Path(config.test_data).name}" if config.test_data else ""
    return f"{results_dir(path).name}{f', step {step:,}' if step is not None else ''}{average}{data}"


def check_head(network: Network) -> None:
    """Refuse a network that cannot make z.

    Raises:
        ValueError: its checkpoint holds no projection head, or not all of it.
    """
    if not network.head or len(network.head) < network.num_head_layers:
        raise ValueError(
            f"{network.source} must hold the whole projection head, which makes z of h, got {len(network.head)} of its "
            f"{network.num_head_layers} layers; take the checkpoint of a pretraining"
        )


def shown_classes(labels: NDArray[np.int64], wanted: tuple[str, ...], names: list[str]) -> list[int]:
    """The classes that are told apart: those named, or all, or as many as fit, at equal distances, where they do not.

    Raises:
        ValueError: a name is of no class of the set, or too many are named.
    """
    present = [int(label) for label in np.unique(labels)]
    if wanted:
        known = {names[label]: label for label in present}
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(
                f"`classes` must be classes of the set, got {unknown[0]!r}; it has {', '.join(known)[:300]}"
            )
        if len(set(wanted)) < len(wanted) or not 2 <= len(wanted) <= MAX_CLASSES:
            raise ValueError(
                f"`classes` must name 2 to {MAX_CLASSES}, each once, got {len(wanted)}: {', '.join(wanted)}"
            )
        return sorted(known[name] for name in wanted)
    if len(present) <= MAX_CLASSES:
        return present
    return [present[i * len(present) // MAX_CLASSES] for i in range(MAX_CLASSES)]


def balanced_rows(
    labels: NDArray[np.int64], classes: list[int], num_images: int | None, seed: int
) -> NDArray[np.int64]:
    """About `num_images` rows (None: 2000, or as many as there are), as many of each class, rising.

    Raises:
        ValueError: a class has fewer, or there are more classes than images.
    """
    among = np.flatnonzero(np.isin(labels, classes))
    counts = {label: int((labels == label).sum()) for label in classes}
    smallest = min(counts.values())
    per_class = min(MOST_SHOWN // len(classes), smallest) if num_images is None else num_images // len(classes)
    if not 1 <= per_class <= smallest:
        raise ValueError(
            f"`num_images` must be from {len(classes)} to {smallest * len(classes)}, as many of each of {len(classes)} "
            f"classes, the smallest of which has {smallest}, got {num_images}"
        )
    chosen = balanced_subset(torch.from_numpy(labels[among]), per_class, seed).numpy()
    rows: NDArray[np.int64] = among[chosen]
    return rows
