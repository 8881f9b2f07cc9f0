"""A folder of image files as a source: class folders, a flat folder, or every image at any depth."""

from pathlib import Path

from pipelines.manifest import Quarantined
from tools.image_decoding import read_file
from tools.image_folder import scan_all_images, scan_images
from tools.source_rows import file_facts, fingerprint, rows_facts


class FolderSource:
    """The files below a folder, in torchvision's order.

    Args:
        root: the folder.
        unlabelled: take every file at any depth, without labels.

    Raises:
        ValueError: no such folder, an empty one, a class folder without images, or both layouts mixed.
        OSError: a folder cannot be listed.
    """

    def __init__(self, root: Path, *, unlabelled: bool = False) -> None:
        folder = (scan_all_images if unlabelled else scan_images)(root)
        self.root = folder.root
        self.names = folder.files
        self.labels = folder.labels
        self.classes = folder.classes
        self.strays = [Quarantined(file=name, reason="lies outside the class folders") for name in folder.strays]

    def read(self, index: int) -> bytes:
        """The bytes of a file. Raises `UnusableImage` for what is no readable file."""
        return read_file(self.root / self.names[index])

    def identity(self) -> str:
        """Names, labels, lengths and times of all files; where the folder lies plays no part."""
        files = (fact for name in self.names for fact in file_facts(self.root / name))
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), *files))

    def close(self) -> None:
        """Holds nothing open."""
