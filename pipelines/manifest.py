"""The manifest of a `.beton`: what it was made of, in `<name>.beton.json` beside it.

It names the file behind every row and its checksum, the classes and the options, so that an error can name
an image and `tools.verify` can prove the whole. It holds no time and no absolute path: the same images and
options give the same manifest. A `.beton` written by FFCV has none.

Shapes: n samples, C classes.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.shard_index import ShardIndexError, is_shard_index, load_shard_index

FORMAT = "twinview-manifest"
FORMAT_VERSION = 1


class ManifestError(ValueError):
    """A manifest that cannot be used: one line with its path, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A source file that is not in the `.beton`."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `tools.convert` knows of the `.beton` it wrote."""

    sha256: str
    """Of the `.beton`, as `sha256sum` prints it."""
    num_bytes: int
    """Length of the `.beton`."""
    num_samples: int
    classes: list[str] | None
    """Names by label, C of them; None where the images are not labelled."""
    class_counts: list[int] | None
    """Samples of each class."""
    options: dict[str, str | int]
    """How the images were stored: encode, max_side, quality, page_size."""
    num_converted: int
    """Images that `--encode keep` had to convert, since their own bytes would not do."""
    quarantined: list[Quarantined]
    tools: dict[str, str]
    """Versions of the libraries that decide the bytes."""
    files: list[str]
    """n names, relative to the source folder, with forward slashes."""
    crc32: list[int]
    """n checksums of the stored bytes."""

    def to_json(self) -> str:
        """JSON text, one entry a line, so that two manifests can be compared by `diff`."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def manifest_path(beton_path: str | Path) -> Path:
    """Where the manifest of a `.beton` lies."""
    beton_path = Path(beton_path)
    return beton_path.with_name(beton_path.name + ".json")


def load_manifest(beton_path: str | Path) -> Manifest | None:
    """Reads the manifest beside a `.beton`; None if there is none. For an index of shards: theirs as one.

    Raises:
        ManifestError: it is torn, foreign, at odds with itself, or that of another `.beton`.
    """
    if is_shard_index(beton_path):
        return _load_joined(Path(beton_path))
    path = manifest_path(beton_path)
    try:
        if path.exists() and not path.is_file():  # a pipe would have no end
            raise ManifestError(f"{path}: expected a file, found something else; delete it or convert the images anew")
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror or error})") from error
    manifest = _parse(path, text)
    num_bytes = Path(beton_path).stat().st_size
    if manifest.num_bytes != num_bytes:
        raise ManifestError(
            f"{path}: describes a .beton of {manifest.num_bytes} bytes, the one beside it has {num_bytes}; "
            "delete the manifest or convert the images anew"
        )
    return manifest


def _load_joined(index_path: Path) -> Manifest | None:
    """The manifests of all shards as that of one set; None if one is missing."""
    try:
        shards = load_shard_index(index_path).shards
    except ShardIndexError as error:
        raise ManifestError(str(error)) from None
    found = [load_manifest(shard.path) for shard in shards]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    for shard, part in zip(shards, parts, strict=True):
        if (part.classes, part.sha256) != (parts[0].classes, shard.sha256):
            raise ManifestError(
                f"{manifest_path(shard.path)}: describes another file, or other classes, than {index_path}; bring the "
                "right one back, or convert the images anew"
            )
    counts = [part.class_counts for part in parts if part.class_counts is not None]
    return Manifest(
        # Of the whole there is no file to take a digest of.
        sha256=hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
        num_bytes=sum(part.num_bytes for part in parts),
        num_samples=sum(part.num_samples for part in parts),
        classes=parts[0].classes,
        class_counts=[sum(by_shard) for by_shard in zip(*counts, strict=True)] if counts else None,
        options=parts[0].options,
        num_converted=sum(part.num_converted for part in parts),
        quarantined=[entry for part in parts for entry in part.quarantined],
        tools=parts[0].tools,
        files=[name for part in parts for name in part.files],
        crc32=[checksum for part in parts for checksum in part.crc32],
    )


def file_sha256(file: BinaryIO) -> str:
    """The digest of a whole file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _parse(path: Path, text: bytes) -> Manifest:
    def refuse(what: str) -> ManifestError:
        return ManifestError(f"{path}: {what}; delete it or convert the images anew")

    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"expected JSON, found a torn or foreign file ({error})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise refuse(f"expected a manifest of format {FORMAT!r}, found another file")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise refuse(f"expected manifest version {FORMAT_VERSION}, found {version!r}")
    expected, found = {field.name for field in fields(Manifest)}, set(content)
    if expected != found:
        raise refuse(f"expected the keys {sorted(expected)}, found {sorted(found)}")
    if wrong := [key for key, is_sound in _SOUND.items() if not is_sound(content[key])]:
        raise refuse(f"its values have wrong types ({', '.join(wrong)})")
    content["quarantined"] = [Quarantined(**entry) for entry in content["quarantined"]]
    manifest = Manifest(**content)
    if any(_OUTSIDE.search(name) for name in (*manifest.files, *(entry.file for entry in manifest.quarantined))):
        raise refuse("expected names inside the source folder, found others")
    lengths = {len(manifest.files), len(manifest.crc32), manifest.num_samples}
    if manifest.class_counts is not None:
        lengths.add(sum(manifest.class_counts))
    if len(lengths) != 1:
        raise refuse(f"its counts disagree: {sorted(lengths)} samples")
    if len(manifest.classes or []) != len(manifest.class_counts or []):
        raise refuse("its classes and their counts disagree")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _list_of(is_sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_sound, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"file", "reason"} and all(map(_is_text, value.values()))


_OUTSIDE = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0")
"""A part of a path that is empty, `.` or `..`."""

_SOUND: dict[str, Callable[[Any], bool]] = {
    "sha256": lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "num_bytes": _is_count,
    "num_samples": _is_count,
    "classes": lambda value: value is None or _list_of(_is_text)(value),
    "class_counts": lambda value: value is None or _list_of(_is_count)(value),
    "options": lambda value: isinstance(value, dict) and all(type(item) in (str, int) for item in value.values()),
    "num_converted": _is_count,
    "quarantined": _list_of(_is_entry),
    "tools": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "files": _list_of(_is_text),
    "crc32": _list_of(lambda value: type(value) is int and 0 <= value < 1 << 32),
}
"""Whether the value of each key is of the type that `Manifest` declares."""
