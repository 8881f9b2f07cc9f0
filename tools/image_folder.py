"""Finds the images of a folder, in a fixed order.

Two layouts are read: class folders (torchvision's ImageFolder: one folder a class at the first level, images
anywhere below it, labels by the classes' sorted names) and a flat folder of unlabelled images. Files come in
torchvision's order, so that row i of a `.beton` is sample i of `torchvision.datasets.ImageFolder`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Left behind by file browsers and archives. Hidden files are ignored as well.
IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})
OTHER_SUFFIXES = frozenset({".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".avif"})
NETPBM_SUFFIXES = frozenset({".ppm", ".pgm", ".pbm", ".pnm"})
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".heics", ".heifs"})
IMAGE_SUFFIXES = JPEG_SUFFIXES | OTHER_SUFFIXES | NETPBM_SUFFIXES | HEIF_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The files to be tried as images. Names are relative to the root, with forward slashes."""

    root: Path
    files: list[str]
    labels: list[int] | None
    """The class of each file, or None for a flat folder."""
    classes: list[str] | None
    """The classes' names by label, sorted, or None for a flat folder."""
    strays: list[str]
    """Files beside the class folders, which belong to no class."""


def scan_images(root: str | Path) -> ImageFolder:
    """Lists every file under `root` that may be an image; only hidden files and file browsers' are left out.

    Files are not opened: what turns out to be no image is for the reader to report, whatever its name.

    Raises:
        ValueError: no such folder, an empty one, a class folder without images, or both layouts mixed.
        OSError: a folder cannot be listed.
    """
    root = _existing_folder(root)
    loose, folders = _entries(root)
    loose_image = next((name for name in loose if _has_image_suffix(name)), None)
    if folders and loose_image:
        raise ValueError(
            f"{root} must hold class folders or images, found both (folder {folders[0]!r}, image "
            f"{loose_image!r}); pass --unlabelled to take all of them without labels, or move the loose images away"
        )
    if folders:
        return _scan_classes(root, folders, strays=loose)
    if not any(_may_be_image(name) for name in loose):
        raise ValueError(f"{root} must hold images, or class folders with images, found none")
    return ImageFolder(root=root, files=loose, labels=None, classes=None, strays=[])


def scan_all_images(root: str | Path) -> ImageFolder:
    """Lists every file at any depth below `root`, without labels: sorted by folder, then by name.

    Raises:
        ValueError: no such folder, or one without images.
        OSError: a folder cannot be listed.
    """
    root = _existing_folder(root)
    files = [name.removeprefix("./") for name in _walk(root, ".")]
    if not any(_may_be_image(name) for name in files):
        raise ValueError(f"{root} must hold images at some depth, found {len(files)} other files")
    return ImageFolder(root=root, files=files, labels=None, classes=None, strays=[])


def _existing_folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"the source must be a folder of images, found {'a file' if root.exists() else 'none'} at {root}"
        )
    return root


def _scan_classes(root: Path, classes: list[str], strays: list[str]) -> ImageFolder:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = list(_walk(root, name))
        if not any(_may_be_image(member) for member in members):
            raise ValueError(
                f"class folder {root / name} must hold images, found {len(members)} other files; "
                "add images or remove the folder"
            )
        files += members
        labels += [label] * len(members)
    return ImageFolder(root=root, files=files, labels=labels, classes=classes, strays=strays)


def _walk(root: Path, name: str) -> Iterator[str]:
    """Every file below, sorted by folder, then by name. Links are followed, no folder is visited twice."""
    visited = set()
    listed: list[tuple[str, list[str]]] = []
    for path, folders, files in os.walk(root / name, followlinks=True, onerror=_raise):
        status = Path(path).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(folder for folder in folders if not _ignored(folder))
        listed.append((Path(path).relative_to(root).as_posix(), sorted(f for f in files if not _ignored(f))))
    for folder, files in sorted(listed):
        yield from (f"{folder}/{file}" for file in files)


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders directly inside, both sorted."""
    with os.scandir(folder) as entries:
        shown = [(entry.name, Path(entry).is_dir()) for entry in entries if not _ignored(entry.name)]
    files = sorted(name for name, is_folder in shown if not is_folder)
    return files, sorted(name for name, is_folder in shown if is_folder)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED_NAMES


def _has_image_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _may_be_image(name: str) -> bool:
    return _has_image_suffix(name) or not Path(name).suffix  # crawled images often have no suffix


def _raise(error: OSError) -> None:
    raise error
