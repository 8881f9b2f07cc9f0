"""torchvision v2 with torch's DataLoader, as its documentation advises: on PIL images, or on tensors of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.transforms import v2

from benchmarks.peers.stored_images import Kind, data_loader, twice
from benchmarks.two_views import Augment, Batches


def torchvision_pil(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """On PIL images."""
    return data_loader(path, "pil", twice(view_transform("pil", augment)), batch_size, workers)


def torchvision_io(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """On the uint8 tensors of `torchvision.io.decode_jpeg`."""
    return data_loader(path, "tensor", twice(view_transform("tensor", augment)), batch_size, workers)


def view_transform(kind: Kind, augment: Augment) -> v2.Compose:
    """Crop, flip, and what `augment` asks for."""
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(augment.size, augment.crop_area, augment.crop_aspect, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if augment.color_strength:
        steps.append(v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_prob))
        steps.append(v2.RandomGrayscale(augment.gray_prob))
    if augment.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(augment.blur_kernel, augment.blur_sigma)], augment.blur_prob))
    if kind == "pil":
        steps.append(v2.PILToTensor())
    if augment.color_strength:
        steps.append(v2.ToDtype(torch.float32, scale=True))
    return v2.Compose(steps)
