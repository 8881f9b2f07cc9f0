"""Crops of the images of a plain folder, as a torch `Dataset`: what the processes of the folder loader run.

A file is opened with Pillow, as torchvision's datasets do, and the drawn windows are cut with torchvision's antialiased
resize. `pipelines.folder_loader` says which files are samples, and what becomes of those that are not 8-bit RGB.

Legend: N images, V views, S side of a view.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.draw import draw_views
from pipelines.params import VIEW_PARAMS, ViewParams
from pipelines.recipe import Recipe


class Crops(NamedTuple):
    """A batch as the processes of the DataLoader make it."""

    views: list[Tensor]
    """V × uint8 [N, 3, S, S]; zeros where an image could not be decoded."""
    params: ViewParams
    """`VIEW_PARAMS` [N, V]."""
    reasons: list[str | None]
    """[N]; why an image could not be decoded."""


class CropDataset(Dataset[Crops]):
    """Crops of the images of a folder; an item is addressed by `(epoch, sample)`.

    Args:
        root: the folder.
        recipe: of the views.
        seed: of every view.

    Attributes:
        files: path of each sample.
        labels: int64, of each sample.

    Raises:
        OSError: there is no such folder, or a class folder is empty.
        ValueError: there are no images.
    """

    def __init__(self, root: Path, recipe: Recipe, seed: int) -> None:
        samples = list_images(root)
        self.files = [file for file, _ in samples]
        self.labels = np.array([label for _, label in samples], np.int64)
        self._recipe, self._seed = recipe, seed

    def __len__(self) -> int:
        """Samples of the folder."""
        return len(self.files)

    def __getitem__(self, address: tuple[int, int]) -> Crops:
        """The crops of one image, as a batch of 1."""
        epoch, sample = address
        try:
            image = decode_image(self.files[sample])
        except ValueError as error:
            return self._nothing(str(error))
        height, width = image.shape[-2:]
        row = np.array([sample])
        size = np.array([width], np.int32), np.array([height], np.int32)
        params = draw_views(self._recipe, self._seed, epoch, row, *size)
        views = [
            crop_image(image, p, view.size, view.interpolation)[None]
            for p, view in zip(params[0], self._recipe.views, strict=True)
        ]
        return Crops(views, params, [None])

    def collate(self, items: list[Crops]) -> Crops:
        """One batch of several."""
        if not items:
            nothing = self._nothing("")
            return Crops([view[:0] for view in nothing.views], nothing.params[:0], [])
        views = [torch.cat(parts) for parts in zip(*(item.views for item in items), strict=True)]
        params = np.concatenate([item.params for item in items])
        return Crops(views, params, [item.reasons[0] for item in items])

    def _nothing(self, reason: str) -> Crops:
        views = [torch.zeros((1, 3, view.size, view.size), dtype=torch.uint8) for view in self._recipe.views]
        return Crops(views, np.zeros((1, len(views)), VIEW_PARAMS), [reason])


def list_images(root: Path) -> list[tuple[str, int]]:
    """Path and label of each image below `root`, in torchvision's order.

    Raises:
        OSError: there is no such folder, or a class folder is empty.
        ValueError: there are no images.
    """
    shown = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if any(path.is_dir() for path in shown):
        samples: list[tuple[str, int]] = ImageFolder(str(root)).samples
        return samples
    images = [(str(path), -1) for path in shown if path.suffix.lower() in IMG_EXTENSIONS]
    if not images:
        raise ValueError(f"{root} must hold images, or class folders with images, found none")
    return images


def decode_image(file: str) -> Tensor:
    """An image as uint8 [3, H, W], by Pillow.

    Raises:
        ValueError: it cannot be decoded; the message is the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which is not used
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("is not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # Pillow's plugins let all of these through
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crop_image(image: Tensor, params: np.void, size: int, interpolation: str) -> Tensor:
    """One window, resized and flipped.

    Args:
        image: uint8 [3, H, W].
        params: `VIEW_PARAMS`, of one view.
        size: side of the view, pixels.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        uint8 [3, S, S], rounded once.
    """
    window = F.crop(image, *(int(params[name]) for name in ("top", "left", "height", "width"))).float()
    resized = F.resize(window, [size, size], InterpolationMode(interpolation), antialias=True)
    crop: Tensor = resized.round().clamp(0.0, 255.0).to(torch.uint8)
    return crop.flip(-1) if params["flip"] else crop
