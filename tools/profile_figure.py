"""A diagnosis as a picture: from storage to optimizer, what each stage could do, and what the run does.

Bars from top to bottom in the order in which an image meets the stages, on a logarithmic axis of images a second; lines
for loading alone, training alone, and both together. The stage that limits is named and hatched, so that it is seen
without colours.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tools.pictures_canvas import COLORS, STYLE, new_figure
from tools.preview_sheet import FAINT, INK
from tools.profile_advice import Diagnosis
from tools.profile_table import heading, mark_of
from tools.whole_file import whole_file

FORMATS = {".png": "png", ".svg": "svg"}
SIDE_COLORS = {"loading": COLORS[0], "training": COLORS[1]}
LINES = (
    ("together_images_per_sec", "together, as in a run", INK, "-"),
    ("loading_images_per_sec", "loading, alone", COLORS[0], "--"),
    ("training_images_per_sec", "training, alone", COLORS[4], ":"),
)
SPARE = 1.3  # of the axis beyond the lowest and the highest rate


def check_figure_path(path: Path) -> None:
    """Refuse what no picture can be written to.

    Raises:
        ValueError: another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"`--figure` must be named *.png or *.svg, got {path}")


def write_figure(diagnosis: Diagnosis, path: Path) -> None:
    """Draw it into a file that appears when it is whole.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    image = io.BytesIO()
    kind = FORMATS[path.suffix.lower()]
    with mpl.rc_context(STYLE | {"svg.hashsalt": "twinview", "hatch.linewidth": 0.8}):
        figure = draw(diagnosis)
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    with whole_file(path) as file:
        file.write(image.getvalue())


def draw(diagnosis: Diagnosis) -> Figure:
    """The picture of a diagnosis."""
    profile, stages = diagnosis.profile, list(diagnosis.profile.stages.values())
    figure = new_figure(9.0, 2.3 + 0.36 * len(stages), f"{diagnosis.limiter} limits", heading(profile))
    axes = figure.subplots()
    rates = [stage.images_per_sec for stage in stages] + [getattr(profile, field) for field, *_ in LINES]
    low, high = 10 ** _floor_of(min(rates)), max(rates) * 6  # room for the words behind the longest bar
    for row, stage in enumerate(stages):
        limits = stage.name == diagnosis.limiter
        axes.barh(
            row,
            stage.images_per_sec - low,
            left=low,
            height=0.66,
            color=SIDE_COLORS[stage.side],
            alpha=1.0 if limits else 0.55,
            hatch="////" if limits else None,
            edgecolor=INK if limits else SIDE_COLORS[stage.side],
            linewidth=1.4 if limits else 0.0,
        )
        words = f" {stage.images_per_sec:,.0f}  {mark_of(stage.name, diagnosis)}".rstrip()
        axes.text(
            stage.images_per_sec,
            row,
            words,
            va="center",
            fontweight="bold" if limits else "normal",
            zorder=5,
            bbox={"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    _finish_axes(axes, [f"{stage.name}{' (GPU)' * (stage.place == 'device')}" for stage in stages], low, high)
    for label, stage in zip(axes.get_yticklabels(), stages, strict=True):
        if stage.name == diagnosis.limiter:
            label.set_fontweight("bold")
    for field, words, color, style in LINES:
        rate = getattr(profile, field)
        axes.axvline(rate, color=color, linestyle=style, linewidth=1.8, label=f"{words}: {rate:,.0f}", zorder=4)
    lines, _ = axes.get_legend_handles_labels()
    sides = [Patch(facecolor=color, alpha=0.55, label=f"a stage of {side}") for side, color in SIDE_COLORS.items()]
    figure.legend(handles=[*lines, *sides], loc="outside upper right", ncols=3, fontsize=8.5)
    return figure


def _finish_axes(axes: Axes, names: list[str], low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(len(names) - 0.4, -0.6)  # storage on top
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel("source images a second, logarithmic", color=FAINT)
    axes.xaxis.set_major_locator(LogLocator(base=10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _floor_of(rate: float) -> int:
    """The power of ten below a rate, with some room."""
    power = 0
    while 10.0**power * SPARE > rate:
        power -= 1
    while 10.0 ** (power + 1) * SPARE <= rate:
        power += 1
    return power
