"""Reads cells of a Parquet file's column one by one, in any order, by many threads, in little memory."""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import UnfitEnvironment

if TYPE_CHECKING:
    import pyarrow.parquet

BATCH_BYTES = 8 << 20  # read at once
CACHE_BYTES = 128 << 20  # threads read rows near one another


class ParquetCells:
    """Cells of one column, read forwards in batches, of which the latest are kept; one thread reads at a time.

    Within a row group Parquet can only be read from its start, so a row before the kept ones costs all before it.
    """

    def __init__(self, files: list[Path], column: str) -> None:
        self._files = files
        self._column = column
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], list[Any]] = OrderedDict()  # (file, first row) → cells
        self._num_kept_bytes = 0
        self._file = -1
        self._parquet: pyarrow.parquet.ParquetFile | None = None
        self._ahead: Iterator[tuple[int, list[Any]]] = iter(())
        self._position = 0  # the row that `_ahead` gives next
        self._group_starts: list[int] = []

    def cell(self, file: int, row: int) -> Any:
        """The value in `row` of file number `file`. Raises `OSError` where the file is damaged."""
        with self._lock:
            for (kept_file, first), cells in reversed(self._kept.items()):
                if kept_file == file and first <= row < first + len(cells):
                    return cells[row - first]
            try:
                with damage_named(self._files[file]):
                    return self._read_up_to(file, row)
            except ValueError as error:  # more than this row is lost
                raise OSError(str(error)) from error

    def close(self) -> None:
        """Closes the file that was read last."""
        with self._lock:
            if self._parquet is not None:
                self._parquet.close()
            self._parquet, self._file = None, -1
            self._kept.clear()

    def _read_up_to(self, file: int, row: int) -> Any:
        if file != self._file:
            if self._parquet is not None:
                self._parquet.close()
            self._parquet, self._file = open_parquet(self._files[file]), file
            metadata = self._parquet.metadata
            self._group_starts = [0]
            for group in range(metadata.num_row_groups):
                self._group_starts.append(self._group_starts[-1] + metadata.row_group(group).num_rows)
            self._seek(row)
        group_start = self._group_starts[bisect.bisect_right(self._group_starts, row) - 1]
        if row < self._position or group_start > self._position:
            self._seek(row)
        for first, cells in self._ahead:
            self._position = first + len(cells)
            self._keep(file, first, cells)
            if row < self._position:
                return cells[row - first]
        raise OSError(f"row {row} is not there any more; the file must not change")

    def _seek(self, row: int) -> None:
        group = bisect.bisect_right(self._group_starts, row) - 1
        self._position = self._group_starts[group]
        self._ahead = self._forwards(group)

    def _forwards(self, group: int) -> Iterator[tuple[int, list[Any]]]:
        assert self._parquet is not None
        metadata = self._parquet.metadata
        first = self._group_starts[group]
        for later in range(group, metadata.num_row_groups):
            num_bytes, num_rows = metadata.row_group(later).total_byte_size, metadata.row_group(later).num_rows
            batch_size = max(1, BATCH_BYTES * num_rows // max(1, num_bytes))
            batches = self._parquet.iter_batches(
                batch_size=batch_size, row_groups=[later], columns=[self._column], use_threads=False
            )
            for batch in batches:
                cells = batch.column(0).to_pylist()
                yield first, cells
                first += len(cells)

    def _keep(self, file: int, first: int, cells: list[Any]) -> None:
        self._kept[file, first] = cells
        self._num_kept_bytes += _num_bytes(cells)
        while self._num_kept_bytes > CACHE_BYTES and len(self._kept) > 2:
            _, dropped = self._kept.popitem(last=False)
            self._num_kept_bytes -= _num_bytes(dropped)


def _num_bytes(cells: list[Any]) -> int:
    return sum(len((cell.get("bytes") if isinstance(cell, dict) else cell) or b"") for cell in cells)


def open_parquet(file: Path) -> "pyarrow.parquet.ParquetFile":
    """Opens a file and reads its footer.

    Raises:
        ValueError: it is no Parquet file, or not whole.
        OSError: it cannot be read.
        UnfitEnvironment: `pyarrow` is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UnfitEnvironment(
            "reading Parquet files needs the package pyarrow; pip install -r requirements-formats.txt"
        ) from error
    with damage_named(file):
        # Buffered, so that a huge row group is streamed.
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        parquet.schema_arrow.names  # noqa: B018 — reads the names of the columns, which may be damaged as well
        return parquet


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Turns what `pyarrow` raises over a file into a `ValueError` of one line; errors of the disk stay."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        message = " ".join(str(error).split())
        raise ValueError(f"{file} is no Parquet file, or not whole ({message}); get it anew") from error
