"""Files that appear under their name only when they are whole, and that one process at a time writes.

A lock ends with its process, however that ends: what a killed one left is taken over, never in the way.
"""

import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens `<path>.partial`; it is renamed to `path` if the block ends well and removed if it does not.

    Raises:
        ValueError: another process is writing it.
    """
    partial = partial_path(path)
    with locked_file(partial) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def locked_file(path: Path, *, buffering: int = -1) -> Iterator[BinaryIO]:
    """Opens a file, made if there is none, for reading and writing; no other process opens it so meanwhile.

    Args:
        path: the file.
        buffering: as of `open`.

    Raises:
        ValueError: another process holds it.
    """
    with open_locked(path, buffering=buffering) as file:
        yield file


def open_locked(path: Path, *, buffering: int = -1) -> BinaryIO:
    """`locked_file` without a block: the lock ends when the file is closed."""
    while True:
        with ExitStack() as stack:
            path.touch()
            try:
                file: BinaryIO = stack.enter_context(path.open("r+b", buffering))
            except FileNotFoundError:  # who held it renamed or removed it just now
                continue
            _lock(file, path)
            if _lies_at(file, path):  # else who held it before renamed or removed it
                stack.pop_all()
                return file


def partial_path(path: Path) -> Path:
    """Where a file lies while it is being written."""
    return path.with_name(path.name + ".partial")


@contextmanager
def clean_termination() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, as Ctrl-C does, so that what is half-written is put in order.

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


class Deferred:
    """A signal that came and waits to be acted upon."""

    def __init__(self) -> None:
        """None has come."""
        self._act: Callable[[], None] | None = None

    def act(self) -> None:
        """Does what the signal that came would have done at once."""
        if self._act is not None:
            self._act()

    def catch(self, signal_number: int) -> None:
        """Puts a signal off until `act`; a second one is acted upon at once."""
        before = signal.getsignal(signal_number)
        if not callable(before):
            return

        def handle(number: int, frame: FrameType | None) -> None:
            is_second = self._act is not None
            self._act = lambda: before(number, frame)
            if is_second:
                self._act()

        signal.signal(signal_number, handle)


@contextmanager
def deferred_signals() -> Iterator[Deferred]:
    """Puts SIGINT and SIGTERM off within the block, where they are not fatal anyway, so that no step is half done."""
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield deferred
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            deferred.catch(number)
        yield deferred
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def sync_folder(folder: Path) -> None:
    """A rename outlives a power cut only once its folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another process; wait for it, or choose another name") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{path}: this file system has no locks; let no other process write there", file=sys.stderr)


def _lies_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
