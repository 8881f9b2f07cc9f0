"""What every source of images has in common: names that can stand in a manifest, labels from 0 on, a fingerprint.

Shapes: n rows, C classes.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipelines.manifest import Quarantined

LARGEST_CLASS_NUMBER = 100_000  # beyond it a number is an identifier, and no count of classes
# With a decimal point: what pandas writes of whole numbers beside an empty cell.
_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(?:\.0+)?\Z", re.ASCII)

_LabelT = TypeVar("_LabelT", int, str)

NO_LABEL = "has no label; --unlabelled takes all images, without labels"


def safe_name(text: str) -> str:
    """A relative name with forward slashes and without empty, `.` or `..` parts, whatever a foreign file says."""
    parts = [part.replace("\0", "_") for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join("(..)" if part == ".." else part for part in parts) or "(no name)"


def number_labels(
    values: Sequence[int | str | None], classes: list[str] | None = None
) -> tuple[list[int | None], list[str] | None]:
    """Gives every label a number from 0 to C - 1.

    Whole numbers from 0 on stay as they are, so that the labels of a training and a test set agree; their classes are
    named "0", "1", … up to the largest. All else is numbered in sorted order.

    Args:
        values: n labels; None means "without", and -1 does where the source names its classes or nothing else occurs.
        classes: names that the source itself gives to the numbers 0 to C - 1.

    Returns:
        n numbers (None: without) and the classes' names; None for the latter if no value is a label.

    Raises:
        ValueError: a number outside `classes`.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        return _in_order([None if value is None else str(value) for value in values])
    if classes is not None or set(numbers) <= {None, -1}:
        numbers = [None if number == -1 else number for number in numbers]
    known = {number for number in numbers if number is not None}
    if not known:
        return numbers, None
    smallest, largest = min(known), max(known)
    if classes is not None:
        if smallest < 0 or largest >= len(classes):
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"labels must be 0 to {len(classes) - 1} for its {len(classes)} classes, found {wrong}")
        return numbers, classes
    if smallest < 0 or largest >= LARGEST_CLASS_NUMBER:
        return _in_order(numbers)
    return numbers, [str(number) for number in range(largest + 1)]


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows after their labels were numbered. Where some have a label, those without have left."""

    kept: list[int]
    """Positions, among the rows given, of those that stay."""
    names: list[str]
    labels: list[int] | None
    classes: list[str] | None
    strays: list[Quarantined]
    """The rows that left."""


def label_rows(names: list[str], values: Sequence[int | str | None], classes: list[str] | None = None) -> LabelledRows:
    """Numbers the labels of all rows as `number_labels` does.

    Raises:
        ValueError: a number outside `classes`.
    """
    labels, classes = number_labels(values, classes)
    if classes is None:
        return LabelledRows(kept=list(range(len(names))), names=names, labels=None, classes=None, strays=[])
    kept = [row for row, label in enumerate(labels) if label is not None]
    return LabelledRows(
        kept=kept,
        names=[names[row] for row in kept],
        labels=[label for label in labels if label is not None],
        classes=classes,
        strays=[
            Quarantined(file=name, reason=NO_LABEL) for name, label in zip(names, labels, strict=True) if label is None
        ],
    )


def _in_order(values: Sequence[_LabelT | None]) -> tuple[list[int | None], list[str] | None]:
    ordered = sorted({value for value in values if value is not None})
    number_of = {value: number for number, value in enumerate(ordered)}
    return [None if value is None else number_of[value] for value in values], [str(value) for value in ordered]


def _as_numbers(values: Sequence[int | str | None]) -> list[int | None] | None:
    """The values as whole numbers, which a text file can only spell; None unless all of them are."""
    numbers: list[int | None] = []
    for value in values:
        if value is None or type(value) is int:
            numbers.append(value)
        elif isinstance(value, str) and (match := _WHOLE_NUMBER.match(value)):
            numbers.append(int(match[1]))
        else:
            return None
    return numbers


def fingerprint(facts: Iterable[object]) -> str:
    """SHA-256 over the facts, told apart from one another."""
    digest = hashlib.sha256()
    for fact in facts:
        text = str(fact).encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest()


def file_facts(path: Path) -> tuple[object, ...]:
    """Length and time of the last change of a file; what is not there has neither."""
    try:
        status = path.stat()
    except OSError:
        return ("absent",)
    return (status.st_size, status.st_mtime_ns)


def rows_facts(names: Sequence[str], labels: Sequence[int] | None, classes: Sequence[str] | None) -> Iterable[object]:
    """What of the rows themselves goes into a fingerprint."""
    yield len(names)
    yield from names
    yield from ("unlabelled",) if labels is None else labels
    yield from classes or ()
