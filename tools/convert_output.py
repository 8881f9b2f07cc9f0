"""Writes the samples of a conversion, in order: files, their manifests, and the journal of what was done.

The thread that adds samples does not wait for the disk: a second one has what was added written to the disk, then says
so in the journal. It also gives each whole file its tables, its digest and its name, while the next is being filled.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.manifest import Manifest, Quarantined, file_sha256, manifest_path
from tools.beton_writer import ROW_DTYPE, BetonWriter
from tools.convert_journal import Block, Journal
from tools.convert_manifests import write_partial_manifest
from tools.convert_places import FORECAST_MARGIN, Places, folder_with_room
from tools.convert_progress import Begun, OpenShard, Progress
from tools.image_encoding import EncodedImage
from tools.image_source import ImageSource
from tools.whole_file import open_locked, partial_path, sync_folder

JOURNAL_SECONDS = 2.0  # of work, about, are lost when the process is killed; more often would keep a slow disk busy


class Output:
    """Where the samples go; to be closed. What is not in the journal then is done again next time."""

    def __init__(
        self,
        source: ImageSource,
        places: Places,
        begun: Begun,
        journal: Journal,
        progress: Progress,
        *,
        force: bool = False,
    ) -> None:
        """Goes on where `progress` ends, and keeps it up to date; replaces shards that are there under `force`."""
        self._force = force
        self._source, self._places, self._begun, self._journal = source, places, begun, journal
        self._progress = progress
        self._strays = list(source.strays)
        self._thread = ThreadPoolExecutor(1)
        self._tasks: list[Future[None]] = []
        self._task_failed = False
        self._write_failed = False
        self._opened: list[BinaryIO] = []
        self._file: BinaryIO | None = None
        self._writer: BetonWriter | None = None
        self._num_shards = len(progress.done)
        self._num_journaled = 0  # rows of the open file
        self._num_listed = len(progress.quarantined)
        self._next_journal = time.monotonic() + JOURNAL_SECONDS
        if progress.shard is not None:
            self._open(progress.shard)

    def add(self, index: int, result: EncodedImage | Quarantined) -> None:
        """Takes what became of the next image."""
        try:
            if isinstance(result, Quarantined):
                self._progress.quarantined.append((index, result.reason))
            else:
                labels = self._source.labels
                writer = self._writer_for(index, len(result.data))
                writer.add(result, None if labels is None else labels[index], index)
            self._progress.next_index = index + 1
            if time.monotonic() >= self._next_journal and all(task.done() for task in self._tasks):
                self._journal_rows()
        except OSError:
            self._write_failed = True
            raise

    def finish(self) -> None:
        """Waits until every file is whole and has its name."""
        if self._writer is not None:
            self._close_shard()
        else:
            self._journal_rows()
        self._wait()

    def keep(self) -> None:
        """Journals also the last moments, before `close`, unless a disk failed: then what it holds is not certain."""
        if not (self._write_failed or self._task_failed):
            self._journal_rows()
            self._wait()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)
        for file in self._opened:
            file.close()

    def _writer_for(self, index: int, size: int) -> BetonWriter:
        """The writer of the file that a sample belongs into."""
        writer, limit = self._writer, self._places.shard_size
        if writer is not None and limit is not None:
            is_full = writer.num_samples == writer.capacity or writer.bytes_with(size) > limit
            if writer.num_samples and is_full:
                self._close_shard()
                writer = None
        return self._begin_shard(index) if writer is None else writer

    def _begin_shard(self, index: int) -> BetonWriter:
        places, progress = self._places, self._progress
        num_left = self._begun.num_images - (index if places.shard_size else 0)
        room = int(num_left * progress.mean_size * (1 + FORECAST_MARGIN)) + 2 * places.page_size
        folder = folder_with_room(places, room)
        name = places.shard_name(self._num_shards) if places.shard_size else places.dest.name
        shard = OpenShard(
            name=places.relative(folder, name),
            capacity=places.capacity(num_left, progress.mean_size),
            first_quarantined=self._first_quarantined(),
        )
        writer = self._open(shard)
        self._submit(self._journal.append, Block(kind="open", words={"name": shard.name, "capacity": shard.capacity}))
        return writer

    def _first_quarantined(self) -> int:
        return 0 if self._num_shards == 0 else len(self._progress.quarantined)

    def _open(self, shard: OpenShard) -> BetonWriter:
        rows = shard.rows
        self._file = self._own_file(self._places.dest.parent / shard.name)
        self._opened = [*(file for file in self._opened if not file.closed), self._file]
        self._writer = BetonWriter(
            self._file,
            capacity=shard.capacity,
            labelled=self._source.labels is not None,
            page_size=self._places.page_size,
            rows=rows,
        )
        shard.blocks.clear()
        self._num_journaled = rows.size
        self._progress.shard = shard
        return self._writer

    def _own_file(self, path: Path) -> BinaryIO:
        """The file to be written; a set of the same name elsewhere may use the same folder."""
        file = open_locked(partial_path(path), buffering=0)
        if self._places.shard_size is not None and not self._force and path.exists():
            if not os.fstat(file.fileno()).st_size:
                partial_path(path).unlink()
            file.close()
            raise ValueError(f"{path} exists; pass --force to replace it, or choose another name")
        return file

    def _journal_rows(self) -> None:
        """Hands on what came since the last time."""
        new = np.zeros(0, ROW_DTYPE)
        if self._writer is not None:
            self._writer.flush()
            new = self._writer.rows[self._num_journaled :].copy()
            self._num_journaled += new.size
        quarantined = self._progress.quarantined[self._num_listed :]
        self._num_listed += len(quarantined)
        words = {"next_index": self._progress.next_index, "quarantined": quarantined}
        self._submit(self._record, self._file, Block(kind="rows", words=words, rows=new))
        self._next_journal = time.monotonic() + JOURNAL_SECONDS

    def _record(self, file: BinaryIO | None, block: Block) -> None:
        if file is not None:
            os.fdatasync(file.fileno())
        self._journal.append(block)

    def _close_shard(self) -> None:
        self._journal_rows()
        self._wait()  # also for the file before: two at a time are enough
        writer, file, shard = self._writer, self._file, self._progress.shard
        assert writer is not None
        assert file is not None
        assert shard is not None
        self._writer = self._file = self._progress.shard = None
        end = len(self._progress.quarantined)
        self._submit(self._complete, writer, file, shard, end)
        self._num_shards += 1

    def _complete(self, writer: BetonWriter, file: BinaryIO, shard: OpenShard, next_quarantined: int) -> None:
        """Makes a file whole, with its manifest, and names both."""
        with file:  # whose lock keeps others away until it has its name
            writer.finish()
            sha256, num_bytes = file_sha256(file), file.seek(0, 2)
            rows, classes = writer.rows, self._source.classes
            counts = np.bincount(rows["label"], minlength=len(classes)).tolist() if classes is not None else None
            num_converted = int((rows["kept"] == 0).sum()) if self._begun.options["encode"] == "keep" else 0
            quarantined = self._quarantined(shard.first_quarantined, next_quarantined)
            manifest = Manifest(
                sha256=sha256,
                num_bytes=num_bytes,
                num_samples=int(rows.size),
                classes=classes,
                class_counts=counts,
                options=manifest_options(self._begun),
                num_converted=num_converted,
                quarantined=(self._strays if not self._progress.done else []) + quarantined,
                tools=self._begun.tools,
                files=[],
                crc32=[],
            )
            path = self._places.dest.parent / shard.name
            write_partial_manifest(manifest_path(path), manifest, self._source.names, rows)
            words: dict[str, Any] = {"name": shard.name, "num_bytes": num_bytes, "num_samples": int(rows.size)}
            words |= {"sha256": sha256, "class_counts": counts, "num_converted": num_converted}
            words["next_quarantined"] = next_quarantined
            self._journal.append(Block(kind="done", words=words))
            self._progress.done.append(words)
            publish(self._places, shard.name)

    def _quarantined(self, start: int, end: int) -> list[Quarantined]:
        names = self._source.names
        return [Quarantined(file=names[i], reason=reason) for i, reason in self._progress.quarantined[start:end]]

    def _submit(self, work: Callable[..., None], *args: Any) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.remove(task)
            task.result()
        self._tasks.append(self._thread.submit(self._run, work, *args))

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        if self._task_failed:  # the journal must not speak of what came after a failure
            return
        try:
            work(*args)
        except BaseException:
            self._task_failed = True
            raise

    def _wait(self) -> None:
        while self._tasks:
            self._tasks.pop(0).result()


def manifest_options(begun: Begun) -> dict[str, str | int]:
    """How the images were stored, as a manifest says it."""
    return {name: value for name, value in begun.options.items() if name != "shard_size" and value is not None}


def publish(places: Places, name: str) -> None:
    """Gives a file that is whole, and its manifest, their names, unless they have them."""
    path = places.dest.parent / name
    if partial_path(path).exists():
        if places.shard_size is not None:
            places.dest.unlink(missing_ok=True)  # an index must not name files that are being replaced
        # Should the machine stop between the two renames, no manifest is better than the old file's.
        manifest_path(path).unlink(missing_ok=True)
        partial_path(path).replace(path)
    if partial_path(manifest_path(path)).exists():
        partial_path(manifest_path(path)).replace(manifest_path(path))
    sync_folder(path.parent)
