"""Chooses the columns of a table that hold images and labels, and reads labels out of its cells."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "class_name",
    "cls",
    "target",
    "category",
    "fine_label",
    "label_id",
    "class_id",
)
"""Names that stand for a label where no other is given, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What of a table to take."""

    image: str | None = None
    """The column with the images, or their paths; None finds it."""
    label: str | None = None
    """The column with the labels; None finds it, if there is one."""
    labelled: bool = True
    """False leaves labels unread."""


def given_column(name: str, columns: Sequence[str], what: str, flag: str) -> str:
    """The column of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in columns:
        raise ValueError(
            f"{what} must have the column {name!r} ({flag}), found {', '.join(map(repr, columns)) or 'none'}"
        )
    return name


def only_image_column(candidates: Sequence[str], columns: Sequence[str], what: str) -> str:
    """The one column that can hold images.

    Raises:
        ValueError: there is none, or more than one.
    """
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ValueError(
            f"{what} has several columns with images ({', '.join(candidates)}); choose with --image-column"
        )
    raise ValueError(
        f"{what} must have a column with the bytes of image files (binary, or Image of `datasets`), found "
        f"{', '.join(map(repr, columns)) or 'none'}"
    )


def likely_label_column(columns: Iterable[str], with_classes: Sequence[str] = ()) -> str | None:
    """The column that is named as labels are, whatever the case; else the only one whose classes have names."""
    by_name = {column.strip().lower(): column for column in reversed(list(columns))}
    named = next((by_name[name] for name in LABEL_COLUMNS if name in by_name), None)
    return with_classes[0] if named is None and len(with_classes) == 1 else named


def as_label(cell: Any, where: str) -> int | str | None:
    """A cell as a label: a whole number or a word; empty, null and NaN are none.

    Args:
        cell: what the table holds.
        where: the row, for the message.

    Raises:
        ValueError: it is neither.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool | int):
        return int(cell)
    if isinstance(cell, float) and cell.is_integer():  # what pandas makes of whole numbers beside an empty cell
        return int(cell)
    if isinstance(cell, str):
        return cell.strip() or None
    raise ValueError(
        f"{where}: its label must be a whole number or a word, found {json.dumps(cell, default=str)[:80]}; name "
        "another column with --label-column, or pass --unlabelled"
    )
