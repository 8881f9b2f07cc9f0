"""STL-10's binary files as they are published and as torchvision downloads them, unpacked or in their `.tar.gz`.

Shapes: n images, stored as uint8 [n, 3, 96 (x), 96 (y)].
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.manifest import Quarantined
from tools.source_pixels import archive_members, chosen_split, png
from tools.source_rows import file_facts, fingerprint, rows_facts

FOLDER = "stl10_binary"
ARCHIVE = "stl10_binary.tar.gz"
SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
MAX_PART_BYTES = 1 << 32  # the unlabelled images have 2.8 GB
CLASSES_FILE = "class_names.txt"
SPLITS = ("train", "test", "unlabeled", "train+unlabeled")


class StlSource:
    """The images of a split in torchvision's order, as PNG. With unlabelled images in it, a split has no labels.

    From the archive the split is unpacked to a temporary file (TMPDIR), which goes when the source is closed.

    Args:
        path: the archive, the unpacked folder, or the folder that torchvision was given, with either in it.
        split: train, test, unlabeled or train+unlabeled.
        labelled: False leaves labels out.

    Raises:
        ValueError: no STL-10 there, no split, or damaged files; one line.
        OSError: they cannot be read, or unpacked.
    """

    def __init__(self, path: Path, *, split: str | None, labelled: bool) -> None:
        self._place = _find(path)
        split = chosen_split(split, SPLITS, path)
        parts = split.split("+")
        labelled = labelled and "unlabeled" not in parts
        wanted = [f"{part}_X.bin" for part in parts]
        if labelled:
            wanted += [f"{split}_y.bin", CLASSES_FILE]
        self._files = _open(self._place, wanted)
        try:
            self._ends: list[int] = []
            self.names: list[str] = []
            for part in parts:
                num_images = _num_images(self._files[f"{part}_X.bin"], f"{self._place}: {part}_X.bin")
                self.names += [f"{part}/{index:06d}" for index in range(num_images)]
                self._ends.append(len(self.names))
            self._images = [self._files[f"{part}_X.bin"] for part in parts]
            self.labels: list[int] | None = None
            self.classes: list[str] | None = None
            if labelled:
                self.labels, self.classes = self._read_labels(split)
        except BaseException:
            self.close()
            raise
        self.strays: list[Quarantined] = []
        sources = [self._place / name for name in wanted] if self._place.is_dir() else [self._place]
        self._facts = [fact for source in sources for fact in (source.name, *file_facts(source))]

    def read(self, index: int) -> bytes:
        """A PNG of 96×96 pixels."""
        part = next(number for number, end in enumerate(self._ends) if index < end)
        row = index - (self._ends[part - 1] if part else 0)
        data = os.pread(self._images[part].fileno(), IMAGE_BYTES, row * IMAGE_BYTES)
        if len(data) != IMAGE_BYTES:
            raise OSError(f"{self._place} was cut while it was being read; it must not change")
        return png(np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(2, 1, 0)))

    def identity(self) -> str:
        """The rows, and length and time of the files."""
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), *self._facts))

    def close(self) -> None:
        """Closes the files, and so deletes those that were unpacked."""
        for file in self._files.values():
            file.close()

    def _read_labels(self, split: str) -> tuple[list[int], list[str]]:
        numbers = self._files[f"{split}_y.bin"].read()
        classes = self._files[CLASSES_FILE].read(1 << 16).decode("latin1").split()
        if len(numbers) != len(self.names) or not numbers or not 1 <= min(numbers) <= max(numbers) <= len(classes):
            raise ValueError(
                f"{self._place}: {split}_y.bin must hold {len(self.names)} labels from 1 to {len(classes)}, found "
                f"{len(numbers)} from {min(numbers, default=0)} to {max(numbers, default=0)}; download it again"
            )
        return [number - 1 for number in numbers], classes


def _find(path: Path) -> Path:
    """The unpacked folder, or else the archive."""
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        return path
    for place in (path / FOLDER, path):
        if any((place / f"{part}_X.bin").is_file() for part in ("train", "test", "unlabeled")):
            return place
    if (path / ARCHIVE).is_file():
        return path / ARCHIVE
    raise ValueError(f"{path} must be, or be a folder with, {FOLDER} or {ARCHIVE}; found neither")


def _open(place: Path, wanted: list[str]) -> dict[str, IO[bytes]]:
    files: dict[str, IO[bytes]] = {}
    try:
        if place.is_dir():
            files = {name: (place / name).open("rb") for name in wanted if (place / name).is_file()}
        else:
            with archive_members(place, dict.fromkeys(wanted, MAX_PART_BYTES)) as members:
                for name, stream in members:
                    files[name] = tempfile.TemporaryFile()  # noqa: SIM115 — closed by `close`
                    shutil.copyfileobj(stream, files[name], 1 << 20)
                    files[name].seek(0)
        if missing := [name for name in wanted if name not in files]:
            raise ValueError(f"{place} is not whole: it must have {', '.join(missing)}; download it again")
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return files


def _num_images(file: IO[bytes], what: str) -> int:
    num_bytes = os.fstat(file.fileno()).st_size
    if not num_bytes or num_bytes % IMAGE_BYTES:
        raise ValueError(f"{what} must have a multiple of {IMAGE_BYTES} bytes, found {num_bytes}; download it again")
    return num_bytes // IMAGE_BYTES
