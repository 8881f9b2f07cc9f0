"""The index of a set in shards, `NAME.shards.json`: which `.beton` files make it up, in which order.

A set that outgrows a disk is written as several `.beton` files, each whole by itself. The rows of the set are those of
its shards, one after the other. Wherever a `.beton` is asked for, the index may be named.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_SUFFIX = ".shards.json"
INDEX_FORMAT = "twinview-shards"
INDEX_FORMAT_VERSION = 1


class ShardIndexError(ValueError):
    """An index that cannot be used: one line with its path, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One `.beton` of a set."""

    path: Path
    """Absolute, or relative to the working directory as the index is."""
    num_bytes: int
    num_samples: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The shards of a set."""

    path: Path
    shards: list[Shard]
    """In the order of the set's rows."""

    @property
    def num_samples(self) -> int:
        """Of the whole set."""
        return sum(shard.num_samples for shard in self.shards)


def is_shard_index(path: str | Path) -> bool:
    """Whether a path names an index, by its suffix."""
    return Path(path).name.endswith(INDEX_SUFFIX)


def load_shard_index(path: str | Path) -> ShardIndex:
    """Read an index; its shards are not looked at.

    Raises:
        ShardIndexError: it is missing, torn or foreign.
    """
    path = Path(path)
    if not path.exists():
        raise ShardIndexError(f"{path}: no such file; make one with `python -m tools.convert --shard-size`")
    if not path.is_file():  # a pipe would have no end
        raise ShardIndexError(f"{path}: expected an index of shards, found something that is no regular file")
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ShardIndexError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"expected JSON, found a torn or foreign file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
        raise _refused(path, f"expected an index of format {INDEX_FORMAT!r}, found another file")
    if content.get("format_version") != INDEX_FORMAT_VERSION:
        raise _refused(path, f"expected index version {INDEX_FORMAT_VERSION}, found {content.get('format_version')!r}")
    entries = content.get("shards")
    if not isinstance(entries, list) or not entries:
        raise _refused(path, "expected a list of shards, found none")
    index = ShardIndex(path=path, shards=[_shard(path, i, entry) for i, entry in enumerate(entries)])
    if content.get("num_samples") != index.num_samples:
        raise _refused(path, f"its shards have {index.num_samples} samples, it says {content.get('num_samples')!r}")
    return index


def _shard(path: Path, i: int, entry: Any) -> Shard:
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    name, sha256 = found.get("path"), found.get("sha256")
    num_bytes, num_samples = found.get("num_bytes"), found.get("num_samples")
    if not (isinstance(name, str) and name and "\0" not in name):
        raise _refused(path, f"shard {i} must have a path, found {name!r:.200}")
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise _refused(path, f"shard {i} must have a sha256, found {sha256!r:.200}")
    if not (isinstance(num_bytes, int) and isinstance(num_samples, int) and 0 < num_samples < num_bytes < 1 << 63):
        raise _refused(path, f"shard {i} cannot have {num_samples!r:.50} samples in {num_bytes!r:.50} bytes")
    return Shard(path=path.parent / name, num_bytes=num_bytes, num_samples=num_samples, sha256=sha256)


def _refused(path: Path, what: str) -> ShardIndexError:
    return ShardIndexError(f"{path}: {what}; write it anew by the same `python -m tools.convert`")
