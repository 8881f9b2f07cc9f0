"""One run directory, one run: the same command started twice would mix their metrics and remove their checkpoints."""

from __future__ import annotations

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PATIENCE_S = 20.0  # a run that was told to end, and is started again at once, may still be leaving
CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked_run_dir(run_dir: Path, *, enabled: bool = True, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a run directory while a run goes on; the kernel lets go of it when the process ends, however it does.

    Args:
        run_dir: exists.
        enabled: on one rank.
        patience_s: how long to wait for another that holds it.

    Raises:
        ValueError: another process trains into it.
    """
    if not enabled:
        yield
        return
    with (run_dir / LOCK_FILE).open("w") as file:
        deadline = time.monotonic() + patience_s
        while not _take(file.fileno()):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{run_dir} belongs to a run that is still going on, here or on another machine; wait for it, "
                    "end it, or choose another `name`"
                )
            time.sleep(0.2)
        yield


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        logger.warning("this file system cannot lock; see to it that no other process trains into the same folder")
    return True
