"""A study's numbers as a picture: what was measured, and beside it what the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.study_grid import ONLY
from tools.study_results import FIGURE_NAMES, measured_at, published_at

COLORS = ("#2f6fb4", "#c8553d", "#3d8f5f", "#8a5aa8", "#b0892b", "#4a5568", "#d07ba8")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure of a study as PNG, whole or not at all.

    Args:
        result: from `tools.study_results.collect`.
        path: of the file.
    """
    sides = [True, False] if result["published"]["figures"] else [True]
    figure = Figure(figsize=(6 * len(sides), 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result['title']} — after {result['source']}", fontsize="medium" if len(sides) == 1 else None)
    is_list = len(result["columns"]["values"]) == 1
    plot = _heat if result["symmetric"] else _bars if is_list else _lines
    for axes, measured in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        plot(axes, result, measured=measured)
        axes.set_title(f"measured here ({result['protocol']}), %" if measured else "published (ImageNet, ResNet-50), %")
    temporary = path.with_name(f"{path.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _value(result: Mapping[str, Any], row: str, column: str, figure: str, measured: bool) -> float:
    """Percent, or NaN."""
    if measured:
        found = measured_at(result, row, column, figure)
        return np.nan if found is None else 100 * found["mean"]
    value = published_at(result, row, column, figure)
    return np.nan if value is None else value


def _labels(result: Mapping[str, Any], measured: bool) -> tuple[list[str], list[str]]:
    source = result["published"]
    if measured or not source["figures"]:
        return result["rows"]["values"], result["columns"]["values"]
    return source["rows"], source["columns"]


def _heat(axes: Axes, result: Mapping[str, Any], *, measured: bool) -> None:
    rows, columns = _labels(result, measured)
    columns = [column for column in columns if column != "average"]
    values = np.array([[_value(result, r, c, result["figures"][0], measured) for c in columns] for r in rows])
    averages = [
        100 * result["averages"].get(row, np.nan) if measured else _value(result, row, "average", "accuracy", False)
        for row in rows
    ]
    values = np.column_stack([values, averages])
    axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0.0
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes.axvline(len(columns) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(columns) + 1), [*columns, "average"], rotation=30)
    axes.set_yticks(range(len(rows)), rows)


def _bars(axes: Axes, result: Mapping[str, Any], *, measured: bool) -> None:
    rows, _ = _labels(result, measured)
    column = result["columns"]["values"][0]
    names = result["figures"]
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        values = [_value(result, row, column, name, measured) for row in rows]
        places = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * height
        errors = _errors(result, rows, column, name) if measured else None
        bars = axes.barh(places, values, height, xerr=errors, color=COLORS[k], label=FIGURE_NAMES[name], capsize=2)
        axes.bar_label(bars, [f"{value:.1f}" if np.isfinite(value) else "" for value in values], padding=3, fontsize=8)
    if measured and result["random"] and result["figures"][0] in result["random"]:
        baseline = 100 * result["random"][result["figures"][0]]
        axes.axvline(baseline, color="#555", linestyle="--", label="random weights")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel(result["rows"]["name"])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if column != ONLY:
        axes.set_xlabel(f"with {result['columns']['name']} {column}")
    _legend(axes)


def _lines(axes: Axes, result: Mapping[str, Any], *, measured: bool) -> None:
    rows, columns = _labels(result, measured)
    name = result["figures"][0]
    for k, row in enumerate(rows):
        values = np.array([_value(result, row, column, name, measured) for column in columns])
        there = np.isfinite(values)
        if not there.any():
            continue
        errors = np.concatenate([_errors(result, [row], column, name) for column in columns], axis=1)
        axes.errorbar(
            np.arange(len(columns))[there],
            values[there],
            yerr=errors[:, there] if measured else None,
            marker="o",
            capsize=3,
            color=COLORS[k % len(COLORS)],
            label=row,
        )
    if measured and result["random"]:
        axes.axhline(100 * result["random"][name], color="#555", linestyle="--", label="random weights")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel(result["columns"]["name"])
    if axes.get_legend_handles_labels()[0]:
        _legend(axes, title=result["rows"]["name"])


def _legend(axes: Axes, title: str | None = None) -> None:
    """Below the plot, where it hides nothing."""
    axes.legend(
        title=title,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=4,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )


def _errors(result: Mapping[str, Any], rows: list[str], column: str, name: str) -> np.ndarray[Any, Any]:
    """Distances to both ends of the 95 % intervals, percent, [2, rows]; 0 where there is none."""
    errors = np.zeros((2, len(rows)))
    for i, row in enumerate(rows):
        figure = measured_at(result, row, column, name)
        if figure is not None and figure["interval"] is not None:
            low, high = figure["interval"]
            errors[:, i] = 100 * (figure["mean"] - low), 100 * (high - figure["mean"])
    return errors
