"""A data set that the `datasets` package saved on disk (`save_to_disk`) as a source.

The images' column is an `Image`, whose files are handed on undecoded, or plain bytes. Rows are named `split/row`.

Shapes: n rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.manifest import Quarantined
from tools.image_decoding import UnusableImage, read_file
from tools.source_columns import Columns, as_label, given_column, likely_label_column, only_image_column
from tools.source_pixels import chosen_split
from tools.source_rows import file_facts, fingerprint, label_rows, rows_facts, safe_name
from train.cli import UnfitEnvironment

if TYPE_CHECKING:
    import datasets


class HuggingFaceSource:
    """Rows in the data set's order, through its indices mapping if it has one (after `shuffle`, `select`, `filter`).

    Args:
        path: the folder that `save_to_disk` wrote, of a `Dataset` or a `DatasetDict`.
        columns: by default the only column that can hold images; and the one that is called as labels are, or the only
            `ClassLabel`.
        split: of a `DatasetDict`, which; may be left out if there is only one.

    Raises:
        ValueError: no such data set, split, column or rows; one line.
        OSError: it cannot be read.
        UnfitEnvironment: `datasets` is missing.
    """

    def __init__(self, path: Path, columns: Columns, *, split: str | None) -> None:
        package = _package()
        table, self._folder, part = _load(package, path, split)
        self._column = _image_column(package, table.features, columns.image, str(path))
        if isinstance(table.features[self._column], package.Image):
            table = table.cast_column(self._column, package.Image(decode=False))
        names = [f"{part}/{row:07d}" for row in range(len(table))]
        if not names:
            raise ValueError(f"{path} must hold rows, found none" + (f" in its split {part!r}" if split else ""))
        with_classes = {
            name: kind.names for name, kind in table.features.items() if isinstance(kind, package.ClassLabel)
        }
        label: str | None = None
        if columns.labelled:
            label = columns.label or likely_label_column(table.column_names, list(with_classes))
        values: list[int | str | None] = [None] * len(names)
        if label is not None:
            given_column(label, table.column_names, str(path), "--label-column")
            values = [as_label(cell, f"{path}, row {row}") for row, cell in enumerate(table[label])]
        rows = label_rows(names, values, with_classes.get(label or ""))
        self.names, self.labels, self.classes = rows.names, rows.labels, rows.classes
        self.strays: list[Quarantined] = rows.strays
        self._rows = rows.kept
        self._images = table.select_columns([self._column])

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises `UnusableImage` where the row holds none."""
        cell = self._images[self._rows[index]][self._column]
        if isinstance(cell, dict):
            data, path = cell.get("bytes"), cell.get("path")
            if data is None and path:  # the package keeps where an image lies that it did not take in
                return read_file(Path(path))
            cell = data
        if cell is None:
            raise UnusableImage("has no bytes in its row")
        return bytes(cell)

    def identity(self) -> str:
        """The rows, and name, length and time of every file of the data set."""
        files = sorted(file for file in self._folder.iterdir() if file.is_file() and not file.name.startswith("."))
        facts = (fact for file in files for fact in (file.name, *file_facts(file)))
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), self._column, *facts))

    def close(self) -> None:
        """Lets go of the memory map."""
        del self._images


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnfitEnvironment(
            "reading a Hugging Face data set needs the package datasets; pip install -r requirements-formats.txt"
        ) from error
    return datasets


def _load(package: Any, path: Path, split: str | None) -> "tuple[datasets.Dataset, Path, str]":
    """The data set, the folder that it lies in, and what its rows are named after."""
    if not path.is_dir():
        raise ValueError(f"the source must be a folder that save_to_disk wrote, found none at {path}")
    try:
        loaded = package.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} must be a folder that save_to_disk wrote, whole: {_line(error)}") from error
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    except Exception as error:  # whatever a malformed note raises in the package
        raise ValueError(f"{path} must be a folder that save_to_disk wrote, whole: {_line(error)}") from error
    if isinstance(loaded, package.DatasetDict):
        splits = tuple(loaded)
        if not splits:
            raise ValueError(f"{path} must hold a split, found none")
        part = splits[0] if split is None and len(splits) == 1 else chosen_split(split, splits, path)
        return loaded[part].with_format(None), path / part, safe_name(part)
    if split is not None:
        raise ValueError(f"{path} holds one data set without splits; leave out --split {split}")
    return loaded.with_format(None), path, safe_name(str(loaded.split or "row"))


def _image_column(package: Any, features: Any, given: str | None, what: str) -> str:
    images = [name for name, kind in features.items() if isinstance(kind, package.Image)]
    binary = [name for name, kind in features.items() if _is_bytes(kind)]
    if given is None:
        return only_image_column(images or binary, list(features), what)
    given_column(given, list(features), what, "--image-column")
    if given not in (*images, *binary):
        raise ValueError(f"{what}: the column {given!r} must be an Image or binary, found {features[given]}")
    return given


def _is_bytes(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
