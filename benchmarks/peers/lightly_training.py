"""SimCLR as lightly's documentation shows it: its transform, head, loss, LARS and scheduler, in a plain PyTorch loop.

Written from lightly's SimCLR example (transform, torchvision ResNet, `SimCLRProjectionHead`, `NTXentLoss`, DataLoader)
and its ImageNet benchmark (both views in one batch, `LARS` without decay of norms and biases, a schedule by step).
What lightly leaves open is set so that both sides train the same network in the same way: torchvision's ResNet, as
narrow as ours and with the CIFAR stem, no offset after the last layer, blur and normalisation as in the recipe.

The images lie decoded in memory, as those of torchvision's CIFAR10 do.

Shapes: N images of a batch, S side of a view.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet

from pipelines.beton import MODE_RAW, open_beton


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, in the script's own terms."""

    beton: Path
    """The images, raw."""
    rows: NDArray[np.int64] | None = None
    """Which of them; None: all."""
    batch_size: int
    epochs: int
    warmup_steps: int
    lr: float
    """The peak rate."""
    momentum: float
    weight_decay: float
    trust_coefficient: float
    temperature: float
    precision: Literal["fp32", "bf16"]
    transform: dict[str, Any]
    """Arguments of lightly's SimCLRTransform."""
    blocks: tuple[int, int, int, int]
    """Of the ResNet's stages."""
    width: int
    """Channels of its stem."""
    stem: Literal["imagenet", "cifar"]
    hidden_dim: int
    out_dim: int
    head_layers: int
    weights: dict[str, Tensor]
    """What the network starts with."""
    seed: int = 0


class MemoryImages(Dataset[list[Tensor]]):
    """Images that lie decoded in memory; an item is the views of one."""

    def __init__(self, images: list[NDArray[np.uint8]], transform: Any) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        """Images of the set."""
        return len(self._images)

    def __getitem__(self, i: int) -> list[Tensor]:
        """Two views, float32 [3, S, S] in [0, 1]."""
        views: list[Tensor] = self._transform(Image.fromarray(self._images[i]))
        return views


class SimCLR(nn.Module):
    """Backbone and projection head; the views go through in one batch."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection_head = backbone, projection_head

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """[N, 3, S, S] each → z [N, out_dim] each."""
        z = self.projection_head(self.backbone(torch.cat(views)))
        return list(z.chunk(len(views)))


class Training:
    """The script's objects, and its loop an epoch at a time.

    Args:
        settings: what is trained.
        loader: yields the views of each batch, once an epoch; `data_loader` makes the script's own.
        steps_per_epoch: batches that it yields.
        channels_last: the network's memory format; lightly's examples leave torch's default.
    """

    def __init__(
        self,
        settings: Settings,
        loader: Iterable[list[Tensor]],
        *,
        steps_per_epoch: int,
        channels_last: bool = False,
    ) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.utils import get_weight_decay_parameters
        from lightly.utils.lars import LARS
        from lightly.utils.scheduler import CosineWarmupScheduler

        self._loader = loader
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._bf16 = settings.precision == "bf16"
        self.model = build_model(settings).to(memory_format=self._memory_format)
        self.criterion = NTXentLoss(temperature=settings.temperature)
        decayed, not_decayed = get_weight_decay_parameters([self.model.backbone, self.model.projection_head])
        self.optimizer = LARS(
            [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}],
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            trust_coefficient=settings.trust_coefficient,
        )
        self.scheduler = CosineWarmupScheduler(
            self.optimizer,
            warmup_epochs=settings.warmup_steps,  # in steps, as what follows
            max_epochs=settings.epochs * steps_per_epoch,
            end_value=0.0,
        )

    def epoch(self) -> float:
        """Train on every batch once; returns the mean loss."""
        total, num_steps = torch.zeros(()), 0
        for views in self._loader:
            total += self.step(views)
            num_steps += 1
        return float(total / num_steps)

    def step(self, views: list[Tensor]) -> Tensor:
        """Forward, backward, optimizer, schedule; returns the loss."""
        views = [view.to(memory_format=self._memory_format) for view in views]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            z0, z1 = self.model(views)
        loss: Tensor = self.criterion(z0.float(), z1.float())
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss.detach()


def build_model(settings: Settings) -> SimCLR:
    """The network, with the weights to start with."""
    from lightly.models.modules import SimCLRProjectionHead

    backbone = narrow_resnet(settings.blocks, settings.width, settings.stem)
    head = SimCLRProjectionHead(8 * settings.width, settings.hidden_dim, settings.out_dim, settings.head_layers)
    last_norm = head.layers[-1]
    assert isinstance(last_norm, nn.BatchNorm1d)
    last_norm.bias.requires_grad_(False)  # SimCLR's has a scale alone
    model = SimCLR(backbone, head)
    load_weights_(model, settings.weights)
    return model


def narrow_resnet(blocks: tuple[int, int, int, int], width: int, stem: Literal["imagenet", "cifar"]) -> ResNet:
    """A ResNet of torchvision's basic blocks without its classifier, with `width` channels in the stem."""
    resnet = ResNet(BasicBlock, list(blocks))
    resnet.inplanes = width
    resnet.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    if stem == "cifar":
        resnet.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    resnet.bn1 = nn.BatchNorm2d(width)
    for i, num_blocks in enumerate(blocks):
        stage = resnet._make_layer(BasicBlock, width * 2**i, num_blocks, stride=1 if i == 0 else 2)
        setattr(resnet, f"layer{i + 1}", stage)
    resnet.fc = nn.Identity()
    return resnet


def load_weights_(model: SimCLR, weights: dict[str, Tensor]) -> None:
    """Load our method's `state_dict`: its encoder has torchvision's names, its head the same layers in order."""
    prefix = "encoder."
    model.backbone.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    )
    head = model.projection_head.state_dict()
    layers = model.projection_head.layers
    assert isinstance(layers, nn.Sequential)
    theirs = [name for name in head if name != f"layers.{len(layers) - 1}.bias"]
    ours = [tensor for name, tensor in weights.items() if name.startswith("projection_head.")]
    assert len(theirs) == len(ours), (theirs, list(weights))
    model.projection_head.load_state_dict(head | dict(zip(theirs, ours, strict=True)))


def data_loader(settings: Settings, workers: int) -> DataLoader[list[Tensor]]:
    """The images under lightly's transform, in worker processes that stay from epoch to epoch."""
    images = read_images(settings.beton, settings.rows)
    return DataLoader(
        MemoryImages(images, simclr_transform(settings)),
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )


def simclr_transform(settings: Settings) -> Any:
    """The transform as lightly has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # v2's ToTensor, which it uses, is deprecated
        from lightly.transforms import SimCLRTransform

        return SimCLRTransform(**settings.transform)


def read_images(path: Path, rows: NDArray[np.int64] | None = None) -> list[NDArray[np.uint8]]:
    """The pixels of a raw `.beton`, or of some of its rows: uint8 [H, W, 3] each."""
    beton = open_beton(path)
    assert (beton.modes == MODE_RAW).all(), f"{path} must hold raw images"
    chosen = range(beton.num_samples) if rows is None else rows.tolist()
    return [beton.encoded(i).reshape(beton.heights[i], beton.widths[i], 3).copy() for i in chosen]
