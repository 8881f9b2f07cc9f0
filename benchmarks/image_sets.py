"""The images that the benchmarks read: a folder's, an archive's, or windows of two photographs that scikit-learn has.

What is made here is no match for a real set's variety, but its JPEGs are photographs' and cost as much to decode.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

MADE_SIZES = {"imagenet-sample.tar": (500, 375), "cifar10.tar.xz": (32, 32)}
"""Width and height of the images that stand in for those of an archive."""
SMALL_WINDOW = 3  # a small image's window is as many times as large


def link_images(source: Path, target: Path, num_images: int) -> None:
    """Link to images of `source`: equally many below each class folder, or the first ones of a flat folder."""
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    folders = folders[:num_images] or [source]
    for folder in folders:
        for path in islice(_files_below(folder), max(num_images // len(folders), 1)):
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def unpack_images(archive: Path, target: Path, num_images: int) -> None:
    """Unpack the first images of an archive, keeping the folders that name their classes."""
    with tarfile.open(archive) as tar:
        images = (member for member in tar if member.name.lower().endswith((".jpg", ".jpeg")))
        for member in islice(images, num_images):
            path = target / Path(member.name).parent.name / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content
            path.write_bytes(content.read())


def make_images(archive: str, target: Path, num_images: int) -> None:
    """Stand-ins for an archive's images: windows of two photographs, in turn, mirrored by chance; JPEGs, quality 95."""
    from sklearn.datasets import load_sample_images  # seconds to import, which every contestant would wait for

    rng = np.random.default_rng(0)
    width, height = MADE_SIZES[archive]
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(num_images):
        image = photographs[i % len(photographs)]
        scale = 1 if width > image.width // SMALL_WINDOW else SMALL_WINDOW
        left = int(rng.integers(image.width - scale * width + 1))
        top = int(rng.integers(image.height - scale * height + 1))
        window = image.resize((width, height), box=(left, top, left + scale * width, top + scale * height))
        if rng.random() < 0.5:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = target / f"photograph{i % len(photographs)}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        window.save(path, quality=95)


def _files_below(folder: Path) -> Iterator[Path]:
    """Whatever the format: the converter says which files are no images."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))
