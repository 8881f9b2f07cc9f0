"""The manifest of a `.beton`: what it was made of, in `<name>.beton.json` beside it.

It names the file behind every row and its checksum, the classes and the options, so that an error can name
an image and `tools.verify` can prove the whole. It holds no time and no absolute path: the same images and
options give the same manifest. A `.beton` written by FFCV has none.

Shapes: n samples, C classes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

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
    """Reads the manifest beside a `.beton`; None if there is none.

    Raises:
        ManifestError: it is torn, foreign, at odds with itself, or that of another `.beton`.
    """
    path = manifest_path(beton_path)
    try:
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
    except ValueError as error:
        raise refuse(f"expected JSON, found a torn or foreign file ({error})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise refuse(f"expected a manifest of format {FORMAT!r}, found another file")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise refuse(f"expected manifest version {FORMAT_VERSION}, found {version}")
    expected, found = {field.name for field in fields(Manifest)}, set(content)
    if expected != found:
        raise refuse(f"expected the keys {sorted(expected)}, found {sorted(found)}")
    try:
        content["quarantined"] = [Quarantined(**entry) for entry in content["quarantined"]]
        manifest = Manifest(**content)
        lengths = {len(manifest.files), len(manifest.crc32), manifest.num_samples}
        if manifest.classes is not None and manifest.class_counts is not None:
            lengths.add(sum(manifest.class_counts))
    except TypeError as error:
        raise refuse(f"its values have wrong types ({error})") from error
    if len(lengths) != 1:
        raise refuse(f"its counts disagree: {sorted(lengths)} samples")
    return manifest
