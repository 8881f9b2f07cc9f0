"""What happens to a sample that cannot be decoded: it stops the run by name, or its neighbour takes its place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import Beton
from pipelines.manifest import ManifestError, load_manifest

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

OR_SKIP = ', or set `data.on_error` to "skip"'
MAX_NEIGHBOURS = 16  # under "skip": this many bad samples in a row mean that the file is bad


class BadSamples:
    """Names and counts the samples of a set that cannot be decoded; may be called from several threads.

    Args:
        num_samples: of the set.
        name_of: a sample's name, for messages.
        on_error: `raise` stops at the first one; `skip` names it, counts it, and puts its neighbour in its place.
        remedy: what to do about it.
        rows: int64, rising: those of the set's rows that are used, from which stand-ins come; None: all.

    Attributes:
        num_skipped: how often one was replaced so far; each is named the first time.
    """

    def __init__(
        self,
        num_samples: int,
        name_of: Callable[[int], str],
        on_error: OnError,
        remedy: str = "remove it" + OR_SKIP,
        *,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.num_skipped = 0
        self._rows = np.arange(num_samples) if rows is None else rows
        self._name_of, self._on_error, self._remedy = name_of, on_error, remedy
        self._counting = threading.Lock()
        self._warned: set[int] = set()

    def replace(self, sample: int, reason: str, tries: int) -> int:
        """The row that takes the place of `sample`.

        Args:
            sample: row of the file.
            reason: why it cannot be decoded.
            tries: how many rows in succession, this one included, were tried for one place.

        Raises:
            ValueError: the run is to stop at a bad sample, or `tries` exceeds MAX_NEIGHBOURS.
        """
        message = f"{self._name_of(sample)} cannot be decoded: {reason}"
        if self._on_error == "raise":
            raise ValueError(f"{message}; {self._remedy}")
        if tries > MAX_NEIGHBOURS:
            raise ValueError(f"{message}, nor can the {MAX_NEIGHBOURS} before it; {self._remedy}")
        neighbour = int(self._rows[np.searchsorted(self._rows, sample, side="right") % len(self._rows)])
        with self._counting:
            self.num_skipped += 1
            if sample not in self._warned:
                self._warned.add(sample)
                logger.warning("%s; sample %d stands in for it, whenever its turn comes", message, neighbour)
        return neighbour


def bad_samples_of(
    beton: Beton, on_error: OnError, *, training: bool = True, rows: NDArray[np.int64] | None = None
) -> BadSamples:
    """Those of a `.beton`: a name is the row, and the file if the manifest has it. Only training may skip."""

    @cache  # read when there is a name to tell, and once
    def file_names() -> list[str] | None:
        try:
            manifest = load_manifest(beton.path)
        except ManifestError:
            return None
        return manifest.files if manifest else None

    def name_of(sample: int) -> str:
        files = file_names()
        file = f" ({repr(files[sample])[1:-1]})" if files else ""  # a name may hold anything, line ends too
        return f"sample {sample}{file} of {beton.path}"

    remedy = "convert it again without it" + (OR_SKIP if training else "")
    return BadSamples(beton.num_samples, name_of, on_error, remedy, rows=rows)
