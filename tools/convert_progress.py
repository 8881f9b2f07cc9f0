"""How far a conversion is, as its journal tells it, and whether it is the one that is asked for.

Shapes: n rows.
"""

import os
import platform
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from pipelines.manifest import manifest_path
from tools.beton_writer import ROW_DTYPE
from tools.convert_journal import Journal
from tools.whole_file import partial_path

NUM_REREAD = 64  # samples of an unfinished file, the last ones, that are compared with their checksums


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a conversion was begun with. Equal beginnings give equal bytes."""

    images: str
    """Identity of the source."""
    num_images: int
    options: dict[str, str | int | None]
    """How images are stored, and in shards of how many bytes."""
    tools: dict[str, str]
    """Versions of the libraries that decide the bytes."""

    def differences(self, before: "Begun") -> list[str]:
        """What is not as it was in another."""
        found = []
        if self.images != before.images:
            counts = f"; they were {before.num_images} and are {self.num_images}"
            found.append(f"the images have changed since{counts if self.num_images != before.num_images else ''}")
        for mine, theirs in ((self.options, before.options), (self.tools, before.tools)):
            for name in sorted({*mine, *theirs}):
                if mine.get(name) != theirs.get(name):
                    found.append(f"`{name}` was {theirs.get(name)} and is {mine.get(name)}")
        return found


@dataclass(kw_only=True)
class OpenShard:
    """A `.beton` that is being written."""

    name: str
    """Where it will lie: relative to the destination's folder, or absolute."""
    capacity: int
    first_quarantined: int
    """How many files were in quarantine when the one before it was closed."""
    blocks: list[NDArray[np.void]] = field(default_factory=list)

    @property
    def rows(self) -> NDArray[np.void]:
        """`ROW_DTYPE` [n]: the samples that lie in it."""
        if len(self.blocks) != 1:
            self.blocks = [np.concatenate([np.zeros(0, ROW_DTYPE), *self.blocks])]
        return self.blocks[0]


@dataclass(kw_only=True)
class Progress:
    """What was done."""

    next_index: int = 0
    """The first image of the source that was not."""
    mean_size: float = 0.0
    """Bytes of a sample, by the few that were tried before it began."""
    quarantined: list[tuple[int, str]] = field(default_factory=list)
    """Indices of the images that could not be used, and why."""
    done: list[dict[str, Any]] = field(default_factory=list)
    """The files that are whole."""
    shard: OpenShard | None = None
    """The one that is not."""
    begun: Begun | None = None
    """None if nothing was done yet."""

    @property
    def is_written(self) -> bool:
        """Whether every image was tried and every file is whole."""
        return self.begun is not None and self.shard is None and self.next_index == self.begun.num_images


def read_progress(journal: Journal) -> Progress:
    """Goes through the journal.

    Raises:
        ValueError: it is no journal.
    """
    progress = Progress()
    for block in journal.blocks():
        words = block.words
        match block.kind:
            case "begin":
                progress.begun, progress.mean_size = Begun(**words["begun"]), words["mean_size"]
            case "open":
                first = progress.done[-1]["next_quarantined"] if progress.done else 0
                progress.shard = OpenShard(name=words["name"], capacity=words["capacity"], first_quarantined=first)
            case "rows":
                progress.quarantined += [(index, reason) for index, reason in words["quarantined"]]
                progress.next_index = words["next_index"]
                if progress.shard is not None and block.rows.size:
                    progress.shard.blocks.append(block.rows)
            case "done":
                progress.done.append(words)
                progress.shard = None
    return progress


def begin_words(begun: Begun, mean_size: float) -> dict[str, Any]:
    """What the journal begins with."""
    return {"begun": asdict(begun), "mean_size": mean_size}


def check_goes_on(progress: Progress, begun: Begun, journal_path: Path, folder: Path) -> None:
    """Raises ValueError unless the same conversion was begun, and what it wrote is still there."""

    def refused(what: str) -> ValueError:
        return ValueError(f"{journal_path}: {what}; put that right, or pass --restart to begin anew")

    assert progress.begun is not None
    if differences := begun.differences(progress.begun):
        raise refused(f"a conversion was begun here that cannot go on: {', '.join(differences)}")
    for words in progress.done:
        path = folder / words["name"]
        found = partial_path(path) if partial_path(path).exists() else path
        if not found.exists() or found.stat().st_size != words["num_bytes"]:
            raise refused(f"{path} was written whole, {words['num_bytes']} bytes, and is no longer there")
    if progress.shard is not None:
        _check_rows(progress.shard.rows, partial_path(folder / progress.shard.name), refused)


def discard(progress: Progress, folder: Path, *, whole: bool) -> None:
    """Removes what an unfinished conversion wrote; the files that it finished too if `whole`."""
    names = [words["name"] for words in progress.done]
    for path in (folder / name for name in (*names, *([progress.shard.name] if progress.shard else []))):
        partial_path(path).unlink(missing_ok=True)
        partial_path(manifest_path(path)).unlink(missing_ok=True)
    for name in names if whole else []:
        manifest_path(folder / name).unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Of the libraries that decide the bytes."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pillow_libjpeg_turbo": str(features.version_feature("libjpeg_turbo")),
        "opencv": cv2.__version__,
    }


def _check_rows(rows: NDArray[np.void], path: Path, refused: Any) -> None:
    if not rows.size:
        return
    needed = int(rows["offset"][-1]) + int(rows["size"][-1])
    found = path.stat().st_size if path.is_file() else 0
    if found < needed:
        raise refused(f"{path} must have {needed} bytes, found {found}")
    with path.open("rb") as file:
        for row in rows[-NUM_REREAD:]:
            data = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
            if zlib.crc32(data) != row["crc32"]:
                raise refused(f"{path} does not hold what was written to it (at byte {row['offset']})")
