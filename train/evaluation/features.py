"""Represent a whole set: by a learned encoder, by its randomly initialised twin, or by the pixels themselves.

Every image is seen once, as its central square resized to the side that the encoder was trained on, normalised as in
training; the encoder is in evaluation mode.

Legend: n samples, D width of the representation.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from model.build import build_method
from model.resnet import EncoderConfig, ResNet
from pipelines.augment import center_recipe
from pipelines.batch import Loader
from pipelines.beton import open_beton
from pipelines.build import DataConfig, build_loader
from train.checkpoint import Checkpoint
from train.config import PretrainConfig, config_from_dict
from train.initial_encoder import Weights, check_fits, encoder_weights

Representation = Literal["learned", "random", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Representations and labels of a set.

    Attributes:
        values: float32 [n, D], on the CPU.
        labels: int64 [n], on the CPU.
    """

    values: Tensor
    labels: Tensor


def build_encoder(
    representation: Representation,
    checkpoint: Checkpoint,
    *,
    weights: Weights = "live",
    source: Path = Path("the checkpoint"),
) -> nn.Module:
    """What maps views [N, 3, H, W] to representations [N, D], in evaluation mode on the CPU.

    `random` is the network that the checkpoint's run started from, but for the residual branches, which SimCLR closes
    at the start (γ = 0) and which are open here: a far stronger baseline, and so the fairer one.

    Args:
        representation: which encoder.
        checkpoint: of a run, or imported: an encoder alone.
        weights: of `learned`: those of the last step, or their moving average.
        source: the checkpoint's file, for messages.

    Raises:
        ValueError: the checkpoint's configuration is of another version, or its weights are not those of its encoder.
    """
    if representation == "pixels":
        return nn.Flatten()
    config = config_from_dict(checkpoint.config)
    if representation == "random":
        random = build_method(config.model, config.seed).encoder
        open_residual_branches(random)
        return random.eval()
    return load_encoder(config.model.encoder, encoder_weights(checkpoint, weights, source), source)


def load_encoder(config: EncoderConfig, weights: dict[str, Tensor], source: Path) -> ResNet:
    """The encoder with these weights, which it shares, in evaluation mode.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        encoder = ResNet(config)
    check_fits(weights, encoder.state_dict(), source, "its configuration is of another encoder")
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval()


def open_residual_branches(encoder: nn.Module) -> None:
    """Set every norm's scale to 1."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)


def represent(
    encoder: nn.Module,
    data: str | Path,
    config: PretrainConfig,
    *,
    batch_size: int,
    device: torch.device,
    num_cores: int,
) -> Features:
    """Represent every image of a `.beton`, in its order.

    Args:
        encoder: from `build_encoder`.
        data: the labelled file.
        config: of the run, for the side and the normalisation of the views.
        batch_size: images that go through the encoder at a time.
        device: to compute on.
        num_cores: threads for decoding.

    Raises:
        ValueError: the file is missing, damaged or has no labels.
    """
    with closing(_center_loader(data, config, batch_size, device, num_cores)) as loader:
        return _extract(encoder.to(device).to(memory_format=torch.channels_last), loader)


@torch.inference_mode()
def _extract(encoder: nn.Module, loader: Loader) -> Features:
    values: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader.epoch(0):
        values.append(encoder(batch.views[0]).float().cpu())
        labels.append(batch.labels.cpu())
    return Features(values=torch.cat(values), labels=torch.cat(labels))


def _center_loader(
    data: str | Path, config: PretrainConfig, batch_size: int, device: torch.device, num_cores: int
) -> Loader:
    """Every image of a labelled file once, in its order, as a central view."""
    beton = open_beton(data)
    if beton.labels is None:
        raise ValueError(f"{data} has no labels to evaluate with; convert a folder with one folder for each class")
    return build_loader(
        DataConfig(path=str(data), global_batch_size=batch_size),
        beton,
        center_recipe(config.augment),
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        dtype=torch.float32,
        num_cores=num_cores,
        training=False,
    )
