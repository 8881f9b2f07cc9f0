"""What a study is made of: cells in a grid of rows and columns, each a pretraining configuration.

A cell changes some fields of the study's base configuration; everything else is the base's, so that cells differ in
what is studied alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

from train.config import PretrainConfig

Part = TypeVar("Part", bound=Any)

ACCURACY = "accuracy"
CONTRASTIVE_ACCURACY = "contrastive_accuracy"
ONLY = "top-1"
"""The column of studies that have one."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place in the table of a study."""

    row: str
    """Its row's label, as in the table."""
    column: str
    """Its column's label."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the base configuration, such as `model.temperature`, and their values here."""
    measure: Literal["protocol", "network", "transformation"] = "protocol"
    """Measured by a protocol on frozen features; as a network that was trained with labels; or by what h and z tell of
    the transformation that its row names."""

    @property
    def name(self) -> str:
        """A folder's name, unlike that of any other cell of the study."""
        label = self.row if self.column == ONLY else f"{self.row}--{self.column}"
        return re.sub(r"[^\w.+-]+", "_", label).strip("_")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The values of the rows or the columns, and what they are."""

    name: str
    """Of the quantity, as in the table's head."""
    values: tuple[str, ...]
    """Labels, in the table's order."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One of the papers' ablations."""

    name: str
    title: str
    source: str
    """Paper, table or figure."""
    protocol: str
    """What cells are evaluated by where the user does not say."""
    varies: tuple[str, ...]
    """Fields of the configuration that the cells set themselves."""
    axes: Callable[[PretrainConfig], tuple[Axis, Axis]]
    """The rows and columns that are studied by default."""
    cell: Callable[[PretrainConfig, str, str], Cell | None]
    """The cell of a row and a column; None where the study has none there. A ValueError says why a label is none."""
    figures: tuple[str, ...] = (ACCURACY,)
    """What is measured of each cell; the first is the table's."""
    symmetric: bool = False
    """Cell (a, b) is cell (b, a): each is trained once, and stands in both places."""
    remarks: tuple[str, ...] = ()
    """What else the reader of the table is to know."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A study on one base configuration: its rows, its columns, and what is trained."""

    study: Study
    rows: Axis
    columns: Axis
    cells: tuple[Cell, ...]
    """Each once, in the order in which they are trained."""

    def at(self, row: str, column: str) -> Cell | None:
        """The cell that stands there."""
        found = {(cell.row, cell.column): cell for cell in self.cells}
        mirrored = found.get((column, row)) if self.study.symmetric else None
        return found.get((row, column)) or mirrored


def build_grid(
    study: Study,
    base: PretrainConfig,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    patterns: Sequence[str] = (),
    extra: Sequence[Cell] = (),
) -> Grid:
    """The cells of a study.

    Args:
        study: which.
        base: what cells change.
        rows: labels in place of the study's own; for a symmetric study the columns' too.
        columns: likewise.
        patterns: of the cells, only those whose name one of these matches, as shells match file names.
        extra: further cells, on rows of their own.

    Raises:
        ValueError: a label means nothing in this study, a cell's configuration is none, or nothing is left.
    """
    row_axis, column_axis = study.axes(base)
    row_axis = Axis(name=row_axis.name, values=tuple(dict.fromkeys(rows)) or row_axis.values)
    if study.symmetric:
        if columns:
            raise ValueError(f"`columns` must be left out for {study.name}, which has those of the rows")
        columns = row_axis.values
    column_axis = Axis(name=column_axis.name, values=tuple(dict.fromkeys(columns)) or column_axis.values)
    cells: list[Cell] = []
    for i, row in enumerate(row_axis.values):
        for column in column_axis.values[i if study.symmetric else 0 :]:
            cell = study.cell(base, row, column)
            if cell is not None:
                cells.append(cell)
    cells += extra
    chosen = [cell for cell in cells if not patterns or any(fnmatch(cell.name, pattern) for pattern in patterns)]
    if not chosen:
        names = ", ".join(cell.name for cell in cells)
        raise ValueError(f"`cells` must match a cell of {study.name}, got {list(patterns)}; there are {names}")
    for cell in chosen:
        configure(base, cell, seed=0, runs_dir="")
    all_rows = (*row_axis.values, *(cell.row for cell in extra))
    row_axis = Axis(name=row_axis.name, values=tuple(dict.fromkeys(all_rows)))
    return Grid(study=study, rows=row_axis, columns=column_axis, cells=tuple(chosen))


def configure(base: PretrainConfig, cell: Cell, *, seed: int, runs_dir: str) -> PretrainConfig:
    """The run of a cell.

    Args:
        base: the study's.
        cell: what it changes.
        seed: counted from 0, above the base's own.
        runs_dir: the cell's folder.

    Raises:
        ValueError: the values do not fit the base; the cell is named.
    """
    changes = dict(cell.overrides) | {"name": f"seed{seed}", "runs_dir": runs_dir or ".", "seed": base.seed + seed}
    try:
        return _replaced(base, changes)
    except ValueError as error:
        raise ValueError(f"cell {cell.name}: {error}") from error


def _replaced(config: Part, changes: Mapping[str, Any]) -> Part:
    """With fields such as `model.temperature` replaced, those of one section at once: some only fit together."""
    own: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        if rest:
            sections.setdefault(section, {})[rest] = value
        else:
            own[key] = value
    own |= {name: _replaced(getattr(config, name), inner) for name, inner in sections.items()}
    return dataclasses.replace(config, **own)
