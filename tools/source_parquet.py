"""Parquet files as a source: a column with the bytes of image files, and perhaps one with labels.

The images' column is binary, or the struct {bytes, path} of the Hub's files. The classes' names come from the note
that the `datasets` package leaves in the file. Rows are named `file/row`.

Shapes: n rows.
"""

import bisect
import json
import re
from pathlib import Path
from typing import Any

from pipelines.manifest import Quarantined
from tools.image_decoding import UnusableImage
from tools.source_columns import Columns, as_label, given_column, likely_label_column, only_image_column
from tools.source_parquet_cells import ParquetCells, damage_named, open_parquet
from tools.source_rows import file_facts, fingerprint, label_rows, rows_facts, safe_name

_HUB_NAME = re.compile(r"(.+?)(-\d{5}-of-\d{5})?(-[0-9a-f]{16})?\Z")


class ParquetSource:
    """Rows in the order of the files' names and, within one, of its rows.

    Args:
        path: a Parquet file, or a folder with such files at any depth.
        columns: by default the only column that can hold images; and the one that is called as labels are, or the only
            one whose classes have names.
        split: of a folder, only the files that the Hub's naming gives to this split: `train-00000-of-00002.parquet`.

    Raises:
        ValueError: no such files, columns or rows, or a damaged file; one line that names it.
        OSError: a file cannot be read.
        UnfitEnvironment: `pyarrow` is missing.
    """

    def __init__(self, path: Path, columns: Columns, *, split: str | None) -> None:
        self._root, self._files = _find_files(path, split)
        what = str(self._files[0])
        with open_parquet(self._files[0]) as first:
            schema = first.schema_arrow
        kinds, classes = _described(schema)
        self._column = _image_column(schema, kinds, columns.image, what)
        label: str | None = None
        if columns.labelled:
            label = columns.label or likely_label_column(schema.names, list(classes))
            if label is not None:
                given_column(label, schema.names, what, "--label-column")
        names: list[str] = []
        values: list[int | str | None] = []
        self._starts: list[int] = []
        for file in self._files:
            with open_parquet(file) as parquet:
                found = parquet.schema_arrow
                if self._column not in _image_columns(found):
                    raise ValueError(
                        f"{file} must have the images' column {self._column!r} as {what} has, found {found.names}"
                    )
                name = safe_name(file.relative_to(self._root).as_posix().removesuffix(".parquet"))
                self._starts.append(len(names))
                names += [f"{name}/{row:07d}" for row in range(_num_rows(parquet.metadata, file))]
                values += _labels(parquet, file, label)
        if not names:
            raise ValueError(f"{path} must hold rows, found none")
        rows = label_rows(names, values, classes.get(label or ""))
        self.names, self.labels, self.classes = rows.names, rows.labels, rows.classes
        self.strays: list[Quarantined] = rows.strays
        self._rows = rows.kept
        self._cells = ParquetCells(self._files, self._column)

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises `UnusableImage` where the cell holds none."""
        row = self._rows[index]
        file = bisect.bisect_right(self._starts, row) - 1
        cell = self._cells.cell(file, row - self._starts[file])
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise UnusableImage("has no bytes in its row")
        return bytes(data)

    def identity(self) -> str:
        """The rows, and name, length and time of every file."""
        files = (fact for file in self._files for fact in (file.relative_to(self._root).as_posix(), *file_facts(file)))
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), self._column, *files))

    def close(self) -> None:
        """Closes the file that was read last."""
        self._cells.close()


def _find_files(path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files in order."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"the source must be a Parquet file or a folder with some, found none at {path}")
        if split is not None:
            raise ValueError(f"--split chooses among the files of a folder, but {path} is one file; leave it out")
        return path.parent, [path]
    files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"{path} must hold .parquet files, found none")
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = _HUB_NAME.match(file.stem)
        # Only what is numbered as the Hub numbers it tells of a split; part-0, part-1 are parts of one table.
        name = match[1] if match and (match[2] or file.stem in ("train", "test", "validation", "valid")) else ""
        splits.setdefault(name, []).append(file)
    if split is not None:
        if split not in splits:
            found = ", ".join(sorted(filter(None, splits))) or "none"
            raise ValueError(f"{path} must hold the split {split!r} as {split}-00000-of-00001.parquet, found {found}")
        return path, splits[split]
    if len(splits) > 1:
        raise ValueError(f"{path} holds several splits; choose one with --split: {', '.join(sorted(splits))}")
    return path, files


def _num_rows(metadata: Any, file: Path) -> int:
    """The rows of a file, which its row groups must have and its bytes can hold."""
    in_groups: int = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if metadata.num_rows != in_groups or not 0 <= in_groups <= file.stat().st_size:
        raise ValueError(
            f"{file} is damaged: it states {metadata.num_rows} rows, {in_groups} in its groups; get it anew"
        )
    return in_groups


def _described(schema: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Column → its kind, and column → names of its classes, from the note of the `datasets` package."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}, {}
    described = {name: feature for name, feature in features if isinstance(feature, dict)}
    kinds = {name: feature.get("_type") for name, feature in described.items()}
    names = {name: feature.get("names") for name, feature in described.items() if kinds[name] == "ClassLabel"}
    known = set(schema.names)
    return kinds, {
        name: found
        for name, found in names.items()
        if name in known and isinstance(found, list) and all(isinstance(text, str) for text in found)
    }


def _image_columns(schema: Any) -> list[str]:
    """Those whose type can hold the bytes of image files."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return [
        field.name
        for field in schema
        if is_bytes(field.type)
        or (types.is_struct(field.type) and any(f.name == "bytes" and is_bytes(f.type) for f in field.type))
    ]


def _image_column(schema: Any, kinds: dict[str, Any], given: str | None, what: str) -> str:
    possible = _image_columns(schema)
    if given is not None:
        given_column(given, schema.names, what, "--image-column")
        if given not in possible:
            raise ValueError(
                f"{what}: the column {given!r} must hold bytes or {{bytes, path}}, found {schema.field(given).type}"
            )
        return given
    declared = [name for name in possible if kinds.get(name) == "Image"]
    return only_image_column(declared or possible, schema.names, what)


def _labels(parquet: Any, file: Path, column: str | None) -> list[int | str | None]:
    if column is None:
        return [None] * parquet.metadata.num_rows
    given_column(column, parquet.schema_arrow.names, str(file), "--label-column")
    with damage_named(file):
        cells = parquet.read(columns=[column]).column(0).to_pylist()
    return [as_label(cell, f"{file}, row {row}") for row, cell in enumerate(cells)]
