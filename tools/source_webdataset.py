"""WebDataset shards as a source: tar files whose members share a key where they belong to one sample.

As in the `webdataset` package, the key is a member's path up to the first dot of its base name, and the rest is its
extension: `cat/17.jpg` and `cat/17.cls` are the sample `cat/17`. The headers are read once, an image by one positioned
read. Names are `shard/key`.

The label is the sample's `.cls` (a number or a word), or a field of its `.json`.

Shapes: n rows.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipelines.manifest import Quarantined
from tools.image_decoding import MAX_FILE_BYTES, UnusableImage
from tools.image_folder import IMAGE_SUFFIXES
from tools.source_columns import Columns, as_label
from tools.source_rows import file_facts, fingerprint, label_rows, rows_facts, safe_name
from tools.source_tar import tar_members

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LABEL_BYTES = 1 << 22
DEFAULT_LABEL_FIELD = "label"
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)\Z", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_IGNORED = re.compile(r"__[^/]*__($|/)")  # the package's own notes
_RANGE = re.compile(r"(\d+)\.\.(\d+)\Z", re.ASCII)
_MAX_SHARDS = 1_000_000


@dataclass(kw_only=True)
class _Sample:
    """The members of one key: extension → (offset, length)."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class WebDatasetSource:
    """Samples in the order of the shards and, within one, of their first members.

    Args:
        path: a tar file, a folder with tar files at any depth, or a brace pattern such as `{000..127}.tar`.
        columns: which extension is the image where a sample has several, and which field of the `.json` the label; by
            default the only image, and `.cls`, else the field "label".

    Raises:
        ValueError: no shards, a compressed or damaged one, or no images; one line that names it.
        OSError: a shard cannot be read.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self._shards = _find_shards(path)
        self._shard_names = _shard_names(self._shards)
        self._extension = columns.image.lower().lstrip(".") if columns.image else None
        self._label_field = columns.label
        self.names: list[str] = []
        self.strays: list[Quarantined] = []
        self._where = array("q")  # shard, offset and length of each row
        found_labels: list[int | str | None] = []
        seen: set[str] = set()
        for shard, shard_path in enumerate(self._shards):
            with shard_path.open("rb") as file:
                for key, sample in self._samples(file, shard):
                    name = safe_name(f"{self._shard_names[shard]}/{key}")
                    extension = self._image_of(sample)
                    if extension is None or name in seen:
                        reason = "is there twice; the first is taken" if extension else self._why_no_image(sample)
                        self.strays.append(Quarantined(file=name, reason=reason))
                        continue
                    seen.add(name)
                    self.names.append(name)
                    self._where.extend((shard, *sample.members[extension]))
                    found_labels.append(self._label_of(file, sample, name) if columns.labelled else None)
        if not self.names:
            raise ValueError(
                f"{path} must hold samples with an image, found {len(self.strays)} without"
                + (f" ({self.strays[0].file!r} {self.strays[0].reason})" if self.strays else "")
            )
        self._take_labels(found_labels)

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises `OSError` where the shard is no longer what it was."""
        shard, offset, length = self._where[3 * index : 3 * index + 3]
        if length > MAX_FILE_BYTES:
            raise UnusableImage(f"is too large: {length} bytes, more than {MAX_FILE_BYTES}")
        descriptor = os.open(self._shards[shard], os.O_RDONLY)
        try:
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise OSError(f"{self._shards[shard]} was cut while it was being read; it must not change")
        return data

    def identity(self) -> str:
        """The rows, and length and time of every shard."""
        shards = (
            fact
            for name, path in zip(self._shard_names, self._shards, strict=True)
            for fact in (name, *file_facts(path))
        )
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), *self._where, *shards))

    def close(self) -> None:
        """Holds nothing open."""

    def _samples(self, file: BinaryIO, shard: int) -> Iterator[tuple[str, _Sample]]:
        """The samples of a shard; members that belong to none become strays."""
        samples: dict[str, _Sample] = {}
        for member in tar_members(file, self._shards[shard]):
            name = member.name
            if member.isdir() or _IGNORED.match(name) or name.rpartition("/")[2].startswith("."):
                continue
            match = _MEMBER.match(name)
            reason = None
            if not member.isreg() or member.issparse():
                reason = "is a link" if member.issym() or member.islnk() else "is no plain file"
            elif match is None:
                reason = "has no extension, so it belongs to no sample"
            if match is not None and reason is None:
                extension = match[2].lower()
                sample = samples.setdefault(match[1], _Sample())
                if extension not in sample.members:
                    sample.members[extension] = (member.offset_data, member.size)
                    continue
                reason = "is there twice; the first is taken"
            self.strays.append(Quarantined(file=safe_name(f"{self._shard_names[shard]}/{name}"), reason=str(reason)))
        yield from samples.items()

    def _image_of(self, sample: _Sample) -> str | None:
        """The extension of the image, None if there is none or no telling which."""
        if self._extension is not None:
            return self._extension if self._extension in sample.members else None
        images = _images(sample)
        plain = [extension for extension in images if "." not in extension]  # a mask is often called .seg.png
        candidates = plain or images
        return candidates[0] if len(candidates) == 1 else None

    def _why_no_image(self, sample: _Sample) -> str:
        found = ", ".join("." + extension for extension in sample.members)
        if self._extension is None and len(_images(sample)) > 1:
            return f"has several images ({found}); choose one with --image-column"
        return f"has no image (only {found})"

    def _label_of(self, file: BinaryIO, sample: _Sample, name: str) -> int | str | None:
        from_json = self._label_field is not None or "cls" not in sample.members
        extension = "json" if from_json else "cls"
        if extension not in sample.members:
            return None
        offset, length = sample.members[extension]
        if length > MAX_LABEL_BYTES:
            raise ValueError(f"{name}: its .{extension} must hold a label, found {length} bytes")
        data = os.pread(file.fileno(), length, offset)
        try:
            if not from_json:
                return data.decode().strip() or None
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: its .{extension} is not whole ({error})") from error
        label = content.get(self._label_field or DEFAULT_LABEL_FIELD) if isinstance(content, dict) else None
        return as_label(label, name)

    def _take_labels(self, found: list[int | str | None]) -> None:
        """Numbers the labels; rows without one leave, if others have one."""
        rows = label_rows(self.names, found)
        if rows.classes is None and self._label_field is not None:
            raise ValueError(f"--label-column {self._label_field}: no sample's .json has this field; name another")
        self.names, self.labels, self.classes = rows.names, rows.labels, rows.classes
        self.strays += rows.strays
        self._where = array("q", (value for row in rows.kept for value in self._where[3 * row : 3 * row + 3]))


def _images(sample: _Sample) -> list[str]:
    return [extension for extension in sample.members if "." + extension.rpartition(".")[2] in IMAGE_SUFFIXES]


def _find_shards(path: Path) -> list[Path]:
    """The tar files that a path stands for, in order."""
    if path.is_dir():
        shards = sorted(
            shard for shard in path.rglob("*") if shard.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))
        )
    else:
        shards = [path] if path.exists() else [Path(text) for text in expand_braces(str(path))]
    if not shards:
        raise ValueError(f"{path} must hold .tar files, found none")
    for shard in shards:
        if shard.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise ValueError(
                f"{shard} is compressed, so its members cannot be read at random; unpack it to a .tar first"
            )
        if not shard.is_file():
            raise ValueError(
                f"the shard {shard} must be a tar file, found {'no file' if shard.exists() else 'nothing'}"
            )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}.tar` → `a0.tar`, `a1.tar`, `a2.tar`; `{000..127}` keeps zeros; `{x,y}` takes either.

    Of several pairs the last turns fastest.

    Raises:
        ValueError: braces with neither a range nor a comma, or more than a million names.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    limits = _RANGE.match(match[1])
    if limits is None and "," not in match[1]:
        raise ValueError(
            f"braces must hold a range such as 000..127, or words with commas, found {match[0]!r} in {pattern}"
        )
    if limits is None:
        middles = match[1].split(",")
    else:
        first, last = int(limits[1]), int(limits[2])
        if not first <= last < first + _MAX_SHARDS:
            raise ValueError(f"a range must go up, by less than {_MAX_SHARDS}, found {match[0]!r} in {pattern}")
        middles = [str(number).zfill(len(limits[1])) for number in range(first, last + 1)]
    rests = expand_braces(pattern[match.end() :])
    if len(middles) * len(rests) > _MAX_SHARDS:
        raise ValueError(f"{pattern} stands for more than {_MAX_SHARDS} shards")
    return [f"{pattern[: match.start()]}{middle}{rest}" for middle in middles for rest in rests]


def _shard_names(shards: list[Path]) -> list[str]:
    """Paths below the folder that all shards share, without `.tar`."""
    common = os.path.commonpath([shard.parent for shard in shards])
    return [shard.relative_to(common).as_posix().removesuffix(".tar") for shard in shards]
