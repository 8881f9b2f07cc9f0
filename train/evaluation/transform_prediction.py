"""What h and z = g(h) can tell of a transformation that was applied to the image: SimCLR v1, section 4.2, table 3.

The paper trains "additional MLPs" on either representation "to predict the transformation applied": color against
grayscale, which of four rotations, original against corrupted (by Gaussian noise), original against Sobel filtered. A
loss that asks z to be the same for both views lets g(·) throw away what differs between them, so that h knows more.

Here: every image's central square, transformed as the house draws it (`pipelines.draw`, so that the same seed gives
the same transformations everywhere) by the one transformation in question and no other; the frozen encoder and head in
evaluation mode; all transformations and both representations in one pass over the images, each decoded once; an MLP of
two layers on standardised features, trained on transformed training images and measured on transformed test images
after its last epoch. How the MLP is trained is set in advance, alike for h and z.

In the paper h and z are both 2048 wide, and rotation, noise and Sobel filter were among the transformations of
pretraining (`augment.extra_transformations`), as color and grayscale are in SimCLR's recipe. Where they were not, g(·)
had no reason to throw them away: the result says which were.

Legend: n images, D width of a representation, C classes, T tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import build_recipe, center_recipe
from pipelines.build import Data, DataConfig, Subset, build_loader, open_data
from pipelines.draw import draw_views
from pipelines.recipe import Recipe
from pipelines.rng import key_of
from train.checkpoint import Checkpoint, load_checkpoint
from train.config import PretrainConfig, config_from_dict
from train.evaluation.classification import over_seeds
from train.evaluation.mlp import MLPConfig, mlp_accuracy
from train.evaluation.representation import LayeredNetwork, build_network
from train.evaluation.transform_tasks import TASKS, Task, TaskName
from train.initial_encoder import Weights, Which, find_checkpoint
from train.runtime import choose_device, cores_per_rank, keep_freed_memory, read_ranks

TRAIN_EPOCH, TEST_EPOCH = 0, 1
"""In the address of what is drawn: row 5 of the test set is not transformed as row 5 of the training set."""


@dataclass(frozen=True, kw_only=True)
class TransformPredictionConfig:
    """Whose representations are asked, on which images, and the MLP that asks."""

    checkpoint: str
    """A checkpoint of a run, or a run directory, in which `which` chooses."""
    train_data: str
    """A `.beton` or a folder of images, on which MLPs are trained; labels are not needed."""
    test_data: str
    """Likewise: on which they are measured."""
    which: Which = "latest"
    """Of a run directory: the latest checkpoint, or the best by `train.keep_best`."""
    weights: Weights = "live"
    """Of the checkpoint: those of the last step, or their moving average (`train.ema_decay`)."""
    tasks: tuple[TaskName, ...] = ("color_vs_grayscale", "rotation", "original_vs_corrupted", "original_vs_sobel")
    """What is to be told."""
    num_train_images: int | None = None
    """So many images of `train_data`, chosen by `seed`; null: all."""
    num_test_images: int | None = None
    """Likewise of `test_data`."""
    mlp: MLPConfig = MLPConfig()
    """The classifier that is trained on the representations."""
    num_seeds: int = 3
    """MLPs, which differ in their initial weights and the order of their batches."""
    seed: int = 0
    """Of the transformations and of the first MLP."""
    batch_size: int = 256
    """Images that go through the encoder at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("num_train_images", "num_test_images"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"`{name}` must be null (all) or at least 1, got {number}")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"`tasks` must name at least one, each once, got {list(self.tasks)}")


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """Both representations of transformed images, and what was done to them."""

    h: Tensor
    """float32 [n, D]."""
    z: Tensor
    """float32 [n, E]."""
    applied: Tensor
    """int64 [n]."""


def predict_transformations(config: TransformPredictionConfig) -> dict[str, Any]:
    """Train and measure an MLP for each task, representation and seed.

    Returns:
        What JSON can express: `checkpoint` and its `step`, `num_images`, `width` of h and z, `chosen_by`, `config`, and
        `tasks`, by name: `title`, `random_guess` and `published` {h, z} of table 3, `most_common` (share of the test
        images: what always the same answer gets), `in_pretraining` (whether the run's views were transformed so), and
        `measured` {h, z}: `mean`, `std`, `confidence_interval` (Student's, 95 %; null of one seed) and `by_seed`.
        Shares are in [0, 1].

    Raises:
        ValueError: a file is missing or damaged, has fewer images than asked, or the checkpoint has no projection head.
    """
    path = find_checkpoint(Path(config.checkpoint), config.which)
    checkpoint = load_checkpoint(path)
    trained = config_from_dict(checkpoint.config)
    ranks = read_ranks()
    device, num_cores = choose_device(config.device, ranks), cores_per_rank(ranks)
    if device.type == "cpu":
        keep_freed_memory()
    network = load_both(checkpoint, config.weights, path)
    splits = [
        represent_transformed(network, data, recipe_of(config.tasks, trained), config, epoch, device, num_cores)
        for epoch, data in (
            (TRAIN_EPOCH, open_images(config.train_data, config.num_train_images, config.seed, "train")),
            (TEST_EPOCH, open_images(config.test_data, config.num_test_images, config.seed, "test")),
        )
    ]
    tasks = {
        name: _measure(TASKS[name], train, test, config, trained, device)
        for name, train, test in zip(config.tasks, *splits, strict=True)
    }
    return {
        "protocol": "transform_prediction",
        "checkpoint": str(path),
        "step": checkpoint.position.get("step"),
        "num_images": {"train": len(splits[0][0].applied), "test": len(splits[1][0].applied)},
        "width": {"h": splits[0][0].h.shape[1], "z": splits[0][0].z.shape[1]},
        "chosen_by": "given in advance, alike for h and z; accuracy is that of the MLP's last epoch",
        "config": asdict(config),
        "tasks": tasks,
    }


def recipe_of(tasks: Sequence[TaskName], config: PretrainConfig) -> Recipe:
    """A view a task: the central square, under that transformation alone, normalised as in training."""
    plain = center_recipe(config.augment)
    views = tuple(dataclasses.replace(plain.views[0], **TASKS[name].changes) for name in tasks)
    return dataclasses.replace(plain, views=views)


def load_both(checkpoint: Checkpoint, weights: Weights, source: Path) -> LayeredNetwork:
    """What maps views to h and z, in evaluation mode on the CPU.

    Raises:
        ValueError: the checkpoint holds no projection head, or not all of it.
    """
    network = build_network("learned", checkpoint, weights=weights, source=source)
    if not network.head or len(network.head) < network.num_head_layers:
        raise ValueError(
            f"{source} must hold the whole projection head, which makes z of h, got {len(network.head)} of its "
            f"{network.num_head_layers} layers; take the checkpoint of a pretraining"
        )
    return network.with_layers((0, -1))


def open_images(path: str, num_images: int | None, seed: int, split: Literal["train", "test"]) -> Data:
    """A `.beton` or a folder, or so many of its images.

    Raises:
        ValueError: it holds fewer, or is not what it should be.
    """
    data = open_data(_data_config(path, 1))
    if num_images is None:
        return data
    if num_images > data.num_samples:
        raise ValueError(
            f"`num_{split}_images` must be at most {data.num_samples}, the images of {path}, got {num_images}"
        )
    assert not isinstance(data, Subset)
    rows = np.argsort(key_of(seed, np.arange(data.num_samples)), kind="stable")[:num_images]
    return Subset(data, np.sort(rows).astype(np.int64))


@torch.inference_mode()
def represent_transformed(
    network: LayeredNetwork,
    data: Data,
    recipe: Recipe,
    config: TransformPredictionConfig,
    epoch: int,
    device: torch.device,
    num_cores: int,
) -> list[Transformed]:
    """Both representations of every image under each task's transformation, in one pass; on the CPU.

    Args:
        network: from `load_both`.
        data: from `open_images`.
        recipe: from `recipe_of`, a view a task.
        config: its `tasks` are those of `recipe`.
        epoch: whose transformations are drawn.
        device: to compute on.
        num_cores: threads for decoding.
    """
    network = network.to(device).to(memory_format=torch.channels_last)
    loader = build_loader(
        _data_config(config.train_data if epoch == TRAIN_EPOCH else config.test_data, config.batch_size),
        data,
        recipe,
        seed=config.seed,
        rank=0,
        world_size=1,
        device=device,
        dtype=torch.float32,
        num_cores=num_cores,
        training=False,
    )
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in config.tasks]
    with closing(loader):
        for batch in loader.epoch(epoch):
            rows = batch.sample_indices.numpy()
            sides = np.ones(len(rows), np.int32)  # of these transformations none depends on the image's size
            params = draw_views(recipe, config.seed, epoch, rows, sides, sides)
            for v, name in enumerate(config.tasks):
                h, z = (values.float().cpu() for values in network(batch.views[v]))
                found[v].append((h, z, torch.from_numpy(TASKS[name].applied(params[:, v]))))
    return [
        Transformed(h=h, z=z, applied=applied)
        for h, z, applied in ((torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in found)
    ]


def _measure(
    task: Task,
    train: Transformed,
    test: Transformed,
    config: TransformPredictionConfig,
    trained: PretrainConfig,
    device: torch.device,
) -> dict[str, Any]:
    """The record of one task; see `predict_transformations`."""
    measured = {}
    for name in ("h", "z"):
        train_x, test_x = getattr(train, name), getattr(test, name)
        if not bool(train_x.isfinite().all() and test_x.isfinite().all()):
            raise ValueError(
                f"{config.checkpoint}: {name} must be finite, got NaN or infinity; the encoder has diverged"
            )
        by_seed = [
            mlp_accuracy(
                train_x,
                train.applied,
                test_x,
                test.applied,
                num_classes=task.num_classes,
                config=config.mlp,
                seed=config.seed + i,
                device=device,
            )
            for i in range(config.num_seeds)
        ]
        measured[name] = asdict(over_seeds(by_seed)) | {"by_seed": by_seed}
    counts = torch.bincount(test.applied, minlength=task.num_classes)
    probability = next(name for name in task.changes if name.endswith("_prob"))
    return {
        "title": task.title,
        "random_guess": task.random_guess,
        "most_common": int(counts.max()) / len(test.applied),
        "in_pretraining": any(getattr(view, probability) > 0.0 for view in build_recipe(trained.augment).views),
        "published": task.published,
        "measured": measured,
    }


def _data_config(path: str, batch_size: int) -> DataConfig:
    return DataConfig(path=path, loader="folder" if Path(path).is_dir() else "ffcv", global_batch_size=batch_size)
