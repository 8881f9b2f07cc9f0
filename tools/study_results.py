"""From the records of cells to a study's numbers: means, intervals, what the paper has, and how the orders agree."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from tools.study_grid import ACCURACY, CONTRASTIVE_ACCURACY, Grid
from tools.study_published import AVERAGE, PUBLISHED, Published
from train.evaluation.classification import over_seeds, wilson_interval

OVER_TEST_SET = (ACCURACY, "h", "z")
"""Figures that are shares of the test set."""


def collect(
    grid: Grid, records: Mapping[str, Sequence[Mapping[str, Any]]], random: Mapping[str, Any] | None, num_test: int
) -> dict[str, Any]:
    """Everything that the table and the figure show, as JSON can express it.

    Args:
        grid: of the study.
        records: for each cell's name those of its seeds.
        random: the record of random weights, or None.
        num_test: images that accuracy is measured on.

    Returns:
        `rows` and `columns` (`name`, `values`), `figures` (names), `cells` (a list: `row`, `column`, `name`, and by
        figure `mean`, `std`, `interval` (95 %), `interval_over` and `by_seed`; shares in [0, 1]), `missing` (names),
        `published` (percent), `random` and the cell whose network that is, and `order` (see `agreement`).
    """
    study, published = grid.study, PUBLISHED[grid.study.name]
    cells = [
        {"row": cell.row, "column": cell.column, "name": cell.name, "overrides": dict(cell.overrides)}
        | {"figures": _figures(records[cell.name], study.figures, num_test)}
        | {"seconds": [record["seconds"] for record in records[cell.name]]}
        for cell in grid.cells
        if cell.name in records
    ]
    result = {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "symmetric": study.symmetric,
        "rows": {"name": grid.rows.name, "values": list(grid.rows.values)},
        "columns": {"name": grid.columns.name, "values": list(grid.columns.values)},
        "figures": list(study.figures),
        "cells": cells,
        "missing": [cell.name for cell in grid.cells if cell.name not in records],
        "random": None if random is None else dict(random["figures"]),
        "random_cell": None if random is None else random["cell"],
        "published": _published(published),
        "remarks": list(study.remarks),
    }
    if study.symmetric:
        result["averages"] = _averages(result)
    return result | {"order": agreement(result)}


def measured_at(result: Mapping[str, Any], row: str, column: str, figure: str) -> dict[str, Any] | None:
    """A figure of a place in the table: `mean`, `std`, …; None where nothing is measured."""
    places = [(row, column), (column, row)] if result["symmetric"] else [(row, column)]
    for cell in result["cells"]:
        if (cell["row"], cell["column"]) in places:
            found: dict[str, Any] | None = cell["figures"].get(figure)
            return found
    return None


def published_at(result: Mapping[str, Any], row: str, column: str, figure: str) -> float | None:
    """The paper's number for a place, percent; None where it prints none."""
    for place in result["published"]["figures"]:
        if (place["row"], place["column"]) == (row, column) and figure in place["figures"]:
            return float(place["figures"][figure])
    return None


def agreement(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether measured figures stand in the paper's order: Spearman's ρ over the places that both have.

    Of places that are one cell, the paper's numbers are averaged. None where there are fewer than three.
    """
    figure = result["figures"][0]
    pairs: list[tuple[float, float]] = []
    for cell in result["cells"]:
        places = {(cell["row"], cell["column"])}
        if result["symmetric"]:
            places.add((cell["column"], cell["row"]))
        theirs = [value for place in places if (value := published_at(result, *place, figure)) is not None]
        if theirs and figure in cell["figures"]:
            pairs.append((cell["figures"][figure]["mean"], statistics.fmean(theirs)))
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None  # no order
    return {"spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic), "cells": len(pairs)}


def to_csv(result: Mapping[str, Any]) -> str:
    """A line a cell and figure; shares in [0, 1], the paper's number in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [result["rows"]["name"], result["columns"]["name"], "figure", "mean", "std", "low", "high", "seeds", "paper"]
    )
    for cell in result["cells"]:
        for name, figure in cell["figures"].items():
            low, high = figure["interval"] or ("", "")
            paper = published_at(result, cell["row"], cell["column"], name)
            head = [cell["row"], cell["column"], name, figure["mean"], figure["std"], low, high]
            writer.writerow([*head, len(figure["by_seed"]), "" if paper is None else paper])
    return out.getvalue()


def _figures(records: Sequence[Mapping[str, Any]], names: Sequence[str], num_test: int) -> dict[str, Any]:
    figures = {}
    for name in names:
        values = [float(record["figures"][name]) for record in records if name in record["figures"]]
        if not values:
            continue
        seeds = over_seeds(values)
        interval, over = seeds.confidence_interval, "seeds"
        if interval is None and name in OVER_TEST_SET:
            interval, over = wilson_interval(round(values[0] * num_test), num_test), "test set"
        figures[name] = {
            "mean": seeds.mean,
            "std": seeds.std,
            "interval": None if interval is None else list(interval),
            "interval_over": None if interval is None else over,
            "by_seed": values,
        }
    return figures


def _averages(result: Mapping[str, Any]) -> dict[str, float]:
    """By row, the mean over the columns, as figure 5's last column; rows that are complete."""
    averages = {}
    values = result["rows"]["values"]
    for row in values:
        found = [measured_at(result, row, column, ACCURACY) for column in values]
        means = [figure["mean"] for figure in found if figure is not None]
        if len(means) == len(values):
            averages[row] = statistics.fmean(means)
    return averages


def _published(published: Published) -> dict[str, Any]:
    return {
        "source": published.source,
        "remarks": list(published.remarks),
        "rows": list(published.rows),
        "columns": [column for column in published.columns if column != AVERAGE]
        + [AVERAGE] * (AVERAGE in published.columns),
        "figures": [
            {"row": row, "column": column, "figures": dict(figures)}
            for (row, column), figures in published.figures.items()
        ],
    }


FIGURE_NAMES = {
    ACCURACY: "top-1",
    CONTRASTIVE_ACCURACY: "contrastive accuracy",
    "h": "from h",
    "z": "from z = g(h)",
    "chance": "random guess",
}
