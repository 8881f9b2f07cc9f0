"""What happens to a sample that cannot be decoded: it stops the run by name, or its neighbour takes its place."""

from __future__ import annotations

import logging
import threading
from functools import cached_property
from typing import Literal

from pipelines.beton import Beton
from pipelines.manifest import ManifestError, load_manifest

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

MAX_NEIGHBOURS = 16  # under "skip": this many bad samples in a row mean that the file is bad


class BadSamples:
    """Names and counts the samples of a file that cannot be decoded; may be called from several threads.

    Args:
        beton: the file.
        on_error: `raise` stops at the first one; `skip` names it, counts it, and puts its neighbour in its place.

    Attributes:
        num_skipped: how many were replaced so far.
    """

    def __init__(self, beton: Beton, on_error: OnError) -> None:
        self.num_skipped = 0
        self._beton, self._on_error = beton, on_error
        self._counting = threading.Lock()

    def replace(self, sample: int, reason: str, tries: int) -> int:
        """The row that takes the place of `sample`.

        Args:
            sample: row of the file.
            reason: why it cannot be decoded.
            tries: how many rows in succession, this one included, were tried for one place.

        Raises:
            ValueError: the run is to stop at a bad sample, or `tries` exceeds MAX_NEIGHBOURS.
        """
        message = f"{self.name_of(sample)} cannot be decoded: {reason}"
        if self._on_error == "raise" or tries > MAX_NEIGHBOURS:
            raise ValueError(f'{message}; convert it again without it, or set `data.on_error` to "skip"')
        neighbour = (sample + 1) % self._beton.num_samples
        with self._counting:
            self.num_skipped += 1
            logger.warning("%s; sample %d stands in for it (%d skipped so far)", message, neighbour, self.num_skipped)
        return neighbour

    def name_of(self, sample: int) -> str:
        """Row, and file if the manifest names it."""
        file = f" ({self._file_names[sample]})" if self._file_names else ""
        return f"sample {sample}{file} of {self._beton.path}"

    @cached_property
    def _file_names(self) -> list[str] | None:
        """Of the manifest, if there is a sound one; read when there is a name to tell."""
        try:
            manifest = load_manifest(self._beton.path)
        except ManifestError:
            return None
        return manifest.files if manifest else None
