"""A list of files as a source: CSV, TSV or JSON lines with a column of paths, and perhaps one of labels.

Paths are absolute or relative to the list's folder. Columns are found by the names that people give them, or named by
the caller. Text is UTF-8 with or without a mark, or UTF-16 with one.

Shapes: n rows.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.manifest import Quarantined
from tools.image_decoding import read_file
from tools.image_folder import IMAGE_SUFFIXES
from tools.source_columns import Columns, as_label, given_column, likely_label_column
from tools.source_rows import file_facts, fingerprint, label_rows, rows_facts, safe_name

PATH_COLUMNS = (
    *("path", "file", "file_name", "filename", "filepath", "file_path", "image", "image_path", "img", "img_path"),
    *("image_file", "image_name", "image_filename", "relative_path", "name"),
)
DELIMITERS = ",;\t|"
MAX_CELL = 1 << 20


class ListSource:
    """The files of a list, in its order. What is listed and cannot be a row is a stray with its line.

    Args:
        path: the list; `.jsonl` and `.ndjson` hold an object a line, `.json` a list of objects or the same, all others
            a header and lines of cells.
        columns: of paths and of labels; by default found by their names.

    Raises:
        ValueError: no such list, no such column, a label that is none, no rows, or text of another encoding; one line.
        OSError: the list cannot be read.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        text = _text_of(path)
        as_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
        header, lines = _json_lines(text, path) if as_json else _csv_lines(text, path)
        image = _path_column(header, columns.image, path)
        label = _label_column(header, image, columns, path)
        self._root = path.parent
        self._list = path
        self.strays: list[Quarantined] = []
        names: list[str] = []
        values: list[int | str | None] = []
        paths: list[str] = []
        seen: set[str] = set()
        for number, cells in lines:
            where = f"{path.name}, line {number}"
            if isinstance(cells, str):
                self.strays.append(Quarantined(file=safe_name(where), reason=cells))
                continue
            listed = str(cells.get(image) or "").strip()
            name = safe_name(listed)
            if reason := _why_not(listed, name in seen):
                self.strays.append(Quarantined(file=name if listed else safe_name(where), reason=f"{reason} ({where})"))
                continue
            seen.add(name)
            names.append(name)
            paths.append(listed)
            values.append(as_label(cells.get(label), where) if label is not None else None)
        if not names:
            raise ValueError(f"{path} must list images, found none" + _first(self.strays))
        rows = label_rows(names, values)
        self.names, self.labels, self.classes = rows.names, rows.labels, rows.classes
        self.strays += rows.strays
        self._paths = [paths[row] for row in rows.kept]

    def read(self, index: int) -> bytes:
        """The bytes of a file. Raises `UnusableImage` for what is no readable file."""
        return read_file(self._path(index))

    def identity(self) -> str:
        """The rows, and length and time of every file."""
        files = (fact for index, path in enumerate(self._paths) for fact in (path, *file_facts(self._path(index))))
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), *files))

    def close(self) -> None:
        """Holds nothing open."""

    def _path(self, index: int) -> Path:
        listed = self._paths[index]
        path = self._root / listed
        if "\\" in listed and not path.exists():  # a list that was made on Windows
            return self._root / listed.replace("\\", "/")
        return path


def _why_not(listed: str, twice: bool) -> str | None:
    if not listed:
        return "has no path"
    if twice:
        return "is listed twice; the first is taken"
    if "\0" in listed:
        return "is no path: it holds a zero byte"
    if listed.startswith(("http://", "https://", "s3://", "gs://")):
        return "is an address on the network; download the images first"
    return None


def _first(strays: list[Quarantined]) -> str:
    return f" ({strays[0].file!r} {strays[0].reason})" if strays else ""


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"the list must be a file, found {'a folder' if path.is_dir() else 'none'} at {path}")
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} must be text in UTF-8, found other bytes in line {line}; save it as UTF-8 "
            "(iconv -f latin1 -t utf8)"
        ) from error


def _csv_lines(text: str, path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    """The header, and (line number, cells by column or what is wrong)."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=first.count) if path.suffix.lower() != ".tsv" else "\t"
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: is no line of a CSV file ({error})") from error

    lines = rows()
    _, header = next(lines, (0, []))
    columns = [cell.strip() for cell in header]
    if not columns:
        raise ValueError(f"{path} must begin with a line of column names, such as path,label; found an empty file")
    if any(Path(column).suffix.lower() in IMAGE_SUFFIXES for column in columns):
        raise ValueError(
            f"{path} must begin with a line of column names, such as path,label; found {first[:80]!r}, a row; "
            "add that line"
        )
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise ValueError(f"{path} must name each column once, found {twice!r} twice")

    def by_column() -> Iterator[tuple[int, dict[str, Any] | str]]:
        for number, cells in lines:
            if len(cells) == len(columns):
                yield number, dict(zip(columns, cells, strict=True))
            else:
                yield number, f"has {len(cells)} cells, not {len(columns)} as the header"

    return columns, by_column()


def _json_lines(text: str, path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    """The keys of the first object, and (line number, object or what is wrong)."""
    entries: list[tuple[int, Any]] = []
    number = 0
    try:
        if text.lstrip().startswith("["):
            entries = list(enumerate(json.loads(text), 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    entries.append((number, json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number or 1}: is no JSON ({error})") from error
    columns = next((list(entry) for _, entry in entries if isinstance(entry, dict)), [])
    checked = ((number, entry if isinstance(entry, dict) else "is no JSON object") for number, entry in entries)
    return columns, checked


def _label_column(header: list[str], image: str, columns: Columns, path: Path) -> str | None:
    if not columns.labelled:
        return None
    if columns.label is not None:
        return given_column(columns.label, header, str(path), "--label-column")
    return likely_label_column(column for column in header if column != image)


def _path_column(columns: list[str], given: str | None, path: Path) -> str:
    if given is not None:
        return given_column(given, columns, str(path), "--image-column")
    by_name = {column.lower(): column for column in reversed(columns)}
    if found := next((by_name[name] for name in PATH_COLUMNS if name in by_name), None):
        return found
    if len(columns) == 1:
        return columns[0]
    raise ValueError(
        f"{path} must have a column of paths, called path or file_name or named by --image-column, found "
        f"{', '.join(map(repr, columns)) or 'no columns'}"
    )
