"""Opens whatever images come in: folders, tar shards, tables, the files of well-known data sets.

`open_source` recognises the format, or is told it, and gives rows: a name, a label and the bytes of an image file
each, in an order that is the same every time. What cannot be a row is listed with the reason, never dropped.

Shapes: n rows, C classes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from pipelines.manifest import Quarantined
from tools.source_cifar import CifarSource
from tools.source_columns import Columns
from tools.source_folder import FolderSource
from tools.source_huggingface import HuggingFaceSource
from tools.source_list import ListSource
from tools.source_parquet import ParquetSource
from tools.source_recognition import Format, recognise
from tools.source_stl import StlSource
from tools.source_webdataset import WebDatasetSource

FormatChoice = Literal["auto", "folder", "webdataset", "huggingface", "parquet", "cifar", "stl", "list"]


class ImageSource(Protocol):
    """Images in a fixed order. Any number of threads may read at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Unique and relative, with forward slashes, without `.` and `..`."""

    @property
    def labels(self) -> Sequence[int] | None:
        """Numbers from 0 to C - 1; None without labels."""

    @property
    def classes(self) -> list[str] | None:
        """Names by label; None without labels."""

    @property
    def strays(self) -> Sequence[Quarantined]:
        """What is there and is no row, with the reason."""

    def read(self, index: int) -> bytes:
        """The bytes of row `index` as an image file; bare pixels come as PNG.

        Raises:
            UnusableImage: this row is no image, or damaged.
            OSError: the medium failed; other rows would fare no better.
        """

    def identity(self) -> str:
        """SHA-256 over what decides the rows: names, labels, lengths and times of change, not where they lie."""

    def close(self) -> None:
        """Closes files; `read` must not be called any more."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the images come as."""

    format: FormatChoice = "auto"
    """auto: recognised by what lies there."""
    image_column: str | None = None
    """huggingface, parquet, list: the column with the images, or with their paths; webdataset: their extension."""
    label_column: str | None = None
    """huggingface, parquet, list: the column with the labels; webdataset: the field of the samples' .json."""
    split: str | None = None
    """huggingface, parquet, cifar, stl: which part, such as train or test."""
    unlabelled: bool = False
    """Take every image, without labels; of a folder also loose ones, at any depth."""

    def __post_init__(self) -> None:
        if self.format not in get_args(FormatChoice):
            raise ValueError(f"`format` must be one of {get_args(FormatChoice)}, got {self.format!r}")
        if self.unlabelled and self.label_column is not None:
            raise ValueError(f"`unlabelled` excludes `label_column`, got {self.label_column!r}; leave one out")


_UNDERSTOOD: dict[Format, tuple[str, ...]] = {
    "folder": (),
    "webdataset": ("image_column", "label_column"),
    "huggingface": ("image_column", "label_column", "split"),
    "parquet": ("image_column", "label_column", "split"),
    "cifar": ("split",),
    "stl": ("split",),
    "list": ("image_column", "label_column"),
}
"""The options, beside `unlabelled`, that mean something for each format."""


def open_source(path: Path, options: SourceOptions) -> ImageSource:
    """Lists the rows of what lies at `path`; images are read later.

    Args:
        path: a folder or a file; for webdataset also a brace pattern such as `shards/{000..127}.tar`.
        options: what it is, and what to take of it.

    Raises:
        ValueError: it is not what it should be, or holds no images; one line.
        OSError: it cannot be read.
        UnfitEnvironment: an optional package is missing.
    """
    format = recognise(path) if options.format == "auto" else options.format
    given = [name for name in ("image_column", "label_column", "split") if getattr(options, name) is not None]
    if strange := [name for name in given if name not in _UNDERSTOOD[format]]:
        flag = "--" + strange[0].replace("_", "-")
        raise ValueError(f"{flag} means nothing for {path}, which is read as {format}; leave it out, or set --format")
    labelled = not options.unlabelled
    columns = Columns(image=options.image_column, label=options.label_column, labelled=labelled)
    source: ImageSource
    match format:
        case "folder":
            source = FolderSource(path, unlabelled=options.unlabelled)
        case "webdataset":
            source = WebDatasetSource(path, columns)
        case "huggingface":
            source = HuggingFaceSource(path, columns, split=options.split)
        case "parquet":
            source = ParquetSource(path, columns, split=options.split)
        case "cifar":
            source = CifarSource(path, split=options.split, labelled=labelled)
        case "stl":
            source = StlSource(path, split=options.split, labelled=labelled)
        case "list":
            source = ListSource(path, columns)
    return source


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `source_options` reads."""
    group = parser.add_argument_group("source")
    group.add_argument(
        "--format", choices=get_args(FormatChoice), default="auto", help="what the source is; auto: look and see"
    )
    group.add_argument("--image-column", metavar="NAME", help="huggingface, parquet, list: the images, or their paths")
    group.add_argument("--label-column", metavar="NAME", help="their labels; webdataset: the field of the .json")
    group.add_argument("--split", metavar="NAME", help="huggingface, parquet, cifar, stl: the part to take")
    group.add_argument(
        "--unlabelled", action="store_true", help="take all images, without labels; of a folder at any depth"
    )


def source_options(args: argparse.Namespace) -> SourceOptions:
    """The options of a parsed command line."""
    return SourceOptions(
        format=args.format,
        image_column=args.image_column,
        label_column=args.label_column,
        split=args.split,
        unlabelled=args.unlabelled,
    )
