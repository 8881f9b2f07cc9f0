"""Small `.beton` files for tests, written by the project's own converter."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import open_beton
from tools.convert import convert
from tools.image_encoding import EncodeOptions

needs_data = pytest.mark.skipif("TWINVIEW_DATA" not in os.environ, reason="TWINVIEW_DATA names no folder of test data")


def natural_image(width, height, seed):
    """Smooth colours with an edge and some noise: compresses and resamples like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_beton(folder: Path, sizes, *, encode="jpeg", num_classes=2, max_side=500):
    """A `.beton` of natural images of the given (width, height), in order, labelled by equal runs of samples."""
    for i, (width, height) in enumerate(sizes):
        path = folder / "images" / f"class{i * num_classes // len(sizes)}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        natural_image(width, height, i).save(path)
    convert(folder / "images", folder / "set.beton", EncodeOptions(encode=encode, max_side=max_side), workers=1)
    return open_beton(folder / "set.beton")
