"""SimCLR's transform as solo-learn documents it, with torch's DataLoader; written here: the registry does not have it.

torchvision's first transforms on PIL images, in solo-learn's order: crop, jitter, gray, blur, flip. The blur is
Pillow's with the radius σ. Two things are left out so that all do the same work: its bicubic crop, where others
interpolate linearly, and its normalisation.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageFilter
from torchvision import transforms

from benchmarks.peers.stored_images import data_loader, twice
from benchmarks.two_views import Augment, Batches


class PillowBlur:
    """Pillow's approximation of a Gaussian, σ drawn uniformly."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._sigma)))  # noqa: S311, nothing secret


def solo_learn(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """The whole recipe on PIL images."""
    steps = [
        transforms.RandomResizedCrop(augment.size, augment.crop_area, augment.crop_aspect),
        transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], augment.jitter_prob),
        transforms.RandomGrayscale(augment.gray_prob),
    ]
    if augment.blur:
        steps.append(transforms.RandomApply([PillowBlur(augment.blur_sigma)], augment.blur_prob))
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return data_loader(path, "pil", twice(transforms.Compose(steps)), batch_size, workers)
