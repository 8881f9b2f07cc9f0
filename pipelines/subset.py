"""Which rows of a set are trained on: those of a list of file names, a share of every class, or a number of each.

Every row gets a random number that depends on the seed and the row alone, and each class gives its rows with the
smallest numbers. So subsets of one seed are nested: 5 labels a class hold the 1 of the same seed, and 10 % of the set
hold its 1 %.

n samples of the set.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.rng import key_of

NUM_NAMED = 3  # of the names that a message is about


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Which images of a set are used: one of `list`, `fraction` and `per_class`; without any of them, all."""

    list: str | None = None
    """A text file with the name of one image a line, as the published 1 % and 10 % of ImageNet: its path below the
    folder that was converted, or its file name, where no other folder has the same."""
    fraction: float | None = None
    """Share of every class: 0.01 takes 13 of 1,300 images. Halves are rounded up; each class gives at least one. A set
    without labels counts as one class."""
    per_class: int | None = None
    """Images of every class."""
    seed: int = 0
    """Which subset of that size."""

    def __post_init__(self) -> None:
        given = [name for name in ("list", "fraction", "per_class") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a subset must be given by list, fraction or per_class, got {' and '.join(given)}")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"`fraction` of a subset must be in (0, 1], got {self.fraction}; one percent is 0.01")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"`per_class` of a subset must be at least 1, got {self.per_class}")
        if self.seed < 0:
            raise ValueError(f"`seed` of a subset must not be negative, got {self.seed}")
        if self.seed and self.fraction is None and self.per_class is None:
            raise ValueError(f"`seed` of a subset needs its `fraction` or `per_class`, got {self.seed} alone")

    @property
    def is_whole(self) -> bool:
        """Whether all images are used."""
        return self.list is None and self.fraction is None and self.per_class is None


def choose_rows(
    config: SubsetConfig, labels: NDArray[np.int64] | None, files: Sequence[str] | None, num_samples: int
) -> NDArray[np.int64]:
    """The rows that a configuration asks for, int64, rising.

    Args:
        config: which.
        labels: [n], from 0, or −1 where there are none; None: there are none at all.
        files: [n] names below the set's folder, with forward slashes; None: they are not known.
        num_samples: n.

    Raises:
        ValueError: a class is too small, or there are no labels to count by; or the list names a file that is absent,
            ambiguous or named twice, or none at all; or no names are known.
        OSError: the list cannot be read.
    """
    if config.list is not None:
        if files is None:
            raise ValueError(
                "`list` of a subset needs the names of the images, which the manifest of a .beton has; there is none; "
                "convert the images with `python -m tools.convert`"
            )
        return rows_of_names(read_names(config.list), files, source=config.list)
    if config.fraction is None and config.per_class is None:
        return np.arange(num_samples, dtype=np.int64)
    known = np.full(num_samples, -1, np.int64) if labels is None else np.asarray(labels)
    if config.per_class is not None:
        if bool((known < 0).any()):
            raise ValueError("`per_class` of a subset needs labels, which the set lacks; take a `fraction` of it")
        return balanced_subset(torch.from_numpy(known.copy()), config.per_class, config.seed).numpy()
    assert config.fraction is not None
    classes, counts = np.unique(known, return_counts=True)
    shares = np.maximum(1, np.floor(counts * config.fraction + 0.5)).astype(np.int64)
    return _first_of_each_class(known, classes, shares, config.seed)


def balanced_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Choose `per_class` rows of every class that occurs.

    Args:
        labels: integers [n].
        per_class: rows of each class, at least 1.
        seed: which subset.

    Returns:
        Row numbers, int64 [classes · per_class] on the CPU, rising.

    Raises:
        ValueError: a class has fewer rows; the smallest class is named.
    """
    values = labels.cpu().numpy()
    classes, counts = np.unique(values, return_counts=True)
    if not 1 <= per_class <= counts.min():
        raise ValueError(
            f"labels per class must be between 1 and {counts.min()}, the size of class "
            f"{classes[counts.argmin()]}, got {per_class}; ask for fewer labels"
        )
    return torch.from_numpy(_first_of_each_class(values, classes, np.full(len(classes), per_class), seed))


def read_names(path: str | Path) -> list[str]:
    """The names that a list holds, one a line; blank lines, and spaces around a name, do not count.

    Raises:
        ValueError: it is not there, is no text, or holds no name.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"`list` of a subset must be a text file, there is no {path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`list` of a subset must be a text file with one file name a line, got {path}") from error
    names = [line.strip() for line in text.splitlines()]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"`list` of a subset must name at least one image, {path} is empty")
    return names


def rows_of_names(names: Sequence[str], files: Sequence[str], *, source: str = "the list") -> NDArray[np.int64]:
    """The rows of images named by their path below the set's folder, or by their file name alone, int64, rising.

    Args:
        names: what is asked for.
        files: [n] paths below the set's folder, with forward slashes.
        source: where the names stand, for messages.

    Raises:
        ValueError: names that are absent, ambiguous, or of an image that was named before.
    """
    by_path = {file: row for row, file in enumerate(files)}
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for row, file in enumerate(files):
        by_name[PurePosixPath(file).name].append(row)
    rows: list[int] = []
    absent: list[str] = []
    ambiguous: list[str] = []
    for name in names:
        candidates = [by_path[name]] if name in by_path else by_name.get(name, [])
        if len(candidates) == 1:
            rows.append(candidates[0])
        else:
            (ambiguous if candidates else absent).append(name)
    if absent:
        raise ValueError(_count(absent, "names no image of the set", "name no image of the set", names, source))
    if ambiguous:
        found = _count(ambiguous, "is the name of several images", "are names of several images each", names, source)
        raise ValueError(f"{found}; name each by its path below the set's folder")
    twice = [files[row] for row, times in Counter(rows).items() if times > 1]
    if twice:
        found = _count(twice, "names an image again", "name an image again", names, source)
        raise ValueError(f"{found}; name each once")
    return np.sort(np.array(rows, np.int64))


def rows_checksum(rows: NDArray[np.int64]) -> str:
    """Tells two subsets apart: CRC-32 of the row numbers, eight hexadecimal digits."""
    return f"{zlib.crc32(rows.astype('<i8').tobytes()):08x}"


def _first_of_each_class(
    values: NDArray[np.int64], classes: NDArray[np.int64], numbers: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """The rows of each class with the smallest random numbers, so many as `numbers` says, rising."""
    order = np.argsort(key_of(seed, np.arange(len(values))), kind="stable")
    by_class = order[np.argsort(values[order], kind="stable")]
    begins = np.searchsorted(values[by_class], classes)
    chosen = [by_class[begin : begin + number] for begin, number in zip(begins, numbers, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _count(found: Sequence[str], one: str, several: str, names: Sequence[str], source: str) -> str:
    """Of how many names something is true, and the first few of them."""
    shown = ", ".join(map(repr, found[:NUM_NAMED])) + (", …" if len(found) > NUM_NAMED else "")
    state = one if len(found) == 1 else several
    return f"`list` of a subset: {len(found)} of the {len(names)} names in {source} {state}: {shown}"
