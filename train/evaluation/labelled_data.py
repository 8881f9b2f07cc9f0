"""The labelled sets of an evaluation: opened, compared with each other, and told apart from others.

A set is a `.beton`, or a folder with one folder of images for each class.

Legend: n samples, C classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import Beton, open_beton
from pipelines.build import ImageFolder
from pipelines.manifest import load_manifest
from pipelines.plan import beton_fingerprint

Split = Literal["train", "test", "all"]
"""What a set is to an evaluation; `all`: nothing is learned or held out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledData:
    """One set."""

    split: Split
    path: str
    data: Beton | ImageFolder
    labels: NDArray[np.int64]
    """int64 [n]."""
    classes: list[str] | None
    """Names by label; None where they are unknown."""
    identity: dict[str, Any]
    """Tells this set apart from others and from itself after a change; JSON values."""

    @property
    def field(self) -> str:
        """Of the configuration, for messages."""
        return field_of(self.split)


def field_of(split: Split) -> str:
    """The option that names a set."""
    return "`data`" if split == "all" else f"`{split}_data`"


def open_images(path: str) -> LabelledData:
    """Open a set whose labels, where it has any, do not matter; without decoding anything. None is the label −1.

    Raises:
        ValueError: it is missing or damaged.
        OSError: a class folder is empty.
    """
    return _open_folder(path, "all") if Path(path).is_dir() else _open_beton(path, "all")


def open_labelled(path: str, split: Split) -> LabelledData:
    """Open a set, without decoding anything.

    Raises:
        ValueError: it is missing or damaged, or an image has no label.
        OSError: a class folder is empty.
    """
    data = _open_folder(path, split) if Path(path).is_dir() else _open_beton(path, split)
    missing = data.labels < 0
    if missing.any():
        row = int(missing.argmax())
        found = "none" if missing.all() else f"{data.labels[row]} at sample {row}"
        raise ValueError(
            f"{data.field} must have a label for every image, {path} has {found}; take a folder with one folder for "
            "each class, or convert one"
        )
    return data


def identity_of(path: str, split: Split) -> dict[str, Any] | None:
    """The identity of a set, labelled or not; see `LabelledData`. None of no path."""
    if not path:
        return None
    return (_open_folder(path, split) if Path(path).is_dir() else _open_beton(path, split)).identity


def _open_beton(path: str, split: Split) -> LabelledData:
    beton = open_beton(path)
    manifest = load_manifest(path)
    # A copy: torch wants arrays that can be written to.
    labels = np.full(beton.num_samples, -1) if beton.labels is None else beton.labels.copy()
    identity: dict[str, Any] = {"num_samples": beton.num_samples, "fingerprint": beton_fingerprint(beton)}
    # Without a digest of the whole, any change of the file counts: the fingerprint reads some samples alone.
    identity |= {"sha256": manifest.sha256} if manifest else {"files": [list(stamp[3:]) for stamp in beton.stamps]}
    classes = manifest.classes if manifest else None
    return LabelledData(split=split, path=path, data=beton, labels=labels, classes=classes, identity=identity)


def _open_folder(path: str, split: Split) -> LabelledData:
    from torchvision.datasets.folder import find_classes

    from pipelines.folder_dataset import list_images

    root = Path(path)
    try:
        images = list_images(root)
    except FileNotFoundError as error:  # torchvision names neither field nor folder
        raise FileNotFoundError(
            f"{field_of(split)} must hold images in every class folder of {path}: {' '.join(str(error).split())}"
        ) from error
    labels = np.array([label for _, label in images], np.int64)
    classes = find_classes(path)[0] if labels.max() >= 0 else None
    digest = hashlib.sha256()
    for file, label in images:
        status = Path(file).stat()
        name = Path(file).relative_to(root).as_posix()
        digest.update(f"{name}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    identity = {"num_samples": len(images), "files_sha256": digest.hexdigest()}
    data = ImageFolder(root, len(images))
    return LabelledData(split=split, path=path, data=data, labels=labels, classes=classes, identity=identity)
