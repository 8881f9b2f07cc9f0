"""What the model saw: the views of some images in epoch 0, as the loader of the run draws them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import build_recipe
from pipelines.batch import Batch, MissingPackage
from pipelines.build import Data, build_loader, open_data
from pipelines.recipe import Recipe
from tools.report_page import missing, paragraph, picture, text
from train.config import PretrainConfig
from train.schedule import size_of_epoch

NUM_SHOWN = 12  # images


def contact_sheet(config: PretrainConfig, run_dir: Path) -> str:
    """The views of the first images of epoch 0; why there are none, where there are none."""
    path = config.data.path
    if not Path(path).exists():
        command = f"python -m tools.report {quote(str(run_dir))}"
        return missing(f"{path} is not here: report again where the run's data is, from the same folder.", command)
    try:
        batch = first_batch(config)
    except (ValueError, OSError, MissingPackage) as error:
        return missing(f"The views cannot be drawn: {' '.join(str(error).split())}")
    sides = sorted({view.shape[-1] for view in batch.views}, reverse=True)
    side = " and ".join(f"{side} × {side}" for side in sides)
    drawn = "view that was drawn" if len(batch.views) == 1 else f"{len(batch.views)} views that were drawn"
    said = f"{batch.num_images} images of epoch 0, each in the {drawn} of it, {side} pixels, before normalisation."
    levels = [levels_of(view) for view in batch.views]
    items = "".join(
        f'<li><div class="views{" one" if len(levels) == 1 else ""}">'
        + "".join(picture(view[i], f"view {v + 1} of row {row}") for v, view in enumerate(levels))
        + f"</div>row {text(row)}</li>"
        for i, row in enumerate(batch.sample_indices.tolist())
    )
    return f'{paragraph(said)}<ul class="sheet">{items}</ul>'


def first_batch(config: PretrainConfig) -> Batch:
    """The beginning of epoch 0, on the CPU, without normalisation.

    Raises:
        ValueError, OSError: the data cannot be used.
    """
    data_config = dataclasses.replace(
        config.data,
        loader="folder" if config.data.loader == "folder" else "ffcv",
        photometric="ours",
        geometry="auto",
        num_threads=1,
        on_error="skip",
    )
    data: Data = open_data(data_config)
    side = size_of_epoch(config.schedule, 0, config.augment.size)
    recipe = build_recipe(dataclasses.replace(config.augment, size=side))
    loader = build_loader(
        dataclasses.replace(data_config, global_batch_size=min(NUM_SHOWN, data.num_samples)),
        data,
        Recipe(views=recipe.views),  # without the normalisation: as pictures
        seed=config.seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_cores=1,
    )
    try:
        return next(iter(loader.epoch(0)))
    finally:
        loader.close()


def levels_of(view: Tensor) -> NDArray[np.uint8]:
    """A view [n, 3, S, S] in [0, 1] as uint8 [n, S, S, 3]."""
    levels: NDArray[np.uint8] = (view.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return levels
