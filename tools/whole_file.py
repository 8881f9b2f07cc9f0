"""Files that appear under their name only when they are whole, also when the program is told to stop."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens `<path>.partial`; it is renamed to `path` if the block ends well and removed if it does not.

    Raises:
        ValueError: the partial file exists, so that another process may be writing it.
    """
    partial = partial_path(path)
    try:
        file = partial.open("x+b")
    except FileExistsError:
        raise ValueError(
            f"{partial} exists: another process is writing it, or was killed; delete it if none is running"
        ) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Where a file lies while it is being written."""
    return path.with_name(path.name + ".partial")


@contextmanager
def clean_termination() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, as Ctrl-C does, so that what is half-written is removed.

    To be entered by the main thread: Python delivers signals to no other.
    """

    def unwind(signal_number: int, frame: object) -> None:
        signal.signal(signal_number, signal.SIG_IGN)  # a second one must not interrupt the cleaning
        sys.exit(128 + signal_number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sync_folder(folder: Path) -> None:
    """A rename outlives a power cut only once its folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
