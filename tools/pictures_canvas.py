"""What all pictures have in common: marks that colour-blind eyes tell apart, and files that are whole or not there.

A picture is a PNG and, beside it under the same name, a JSON with the numbers behind it. Both depend on their input
alone: no date, no version of a library is in them.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.preview_sheet import FAINT, INK, PAPER
from tools.whole_file import whole_file

GRID = "#d5dae3"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#b5a800")
"""Okabe and Ito's, told apart by colour-blind eyes; their yellow is darkened, to be seen on white."""
MARKERS = ("o", "^", "s")  # 8 colours and 3 marks, both in turn: 24 pairs
RIGHT, WRONG = COLORS[0], COLORS[4]
DOTS_PER_INCH = 150

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture that is not written yet."""

    figure: Figure
    numbers: dict[str, Any]
    """What JSON can express."""
    folder: Path
    """Where it belongs."""
    name: str
    """Of its files, without their endings."""


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure, in inches, with two lines above what will be drawn.

    The second line is broken where it would be wider than the figure.
    """
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9, color=FAINT, wrap=True)
    return figure


def write_picture(drawn: Drawn) -> Path:
    """Write the numbers and the PNG.

    Returns:
        The PNG.

    Raises:
        ValueError, OSError: they cannot be written; then neither is.
    """
    image = io.BytesIO()
    drawn.figure.savefig(image, format="png", metadata={"Software": None})
    text = json.dumps(drawn.numbers, indent=1, ensure_ascii=False, allow_nan=False)
    drawn.folder.mkdir(parents=True, exist_ok=True)
    path = drawn.folder / f"{drawn.name}.png"
    with whole_file(path.with_suffix(".json")) as numbers, whole_file(path) as picture:
        numbers.write(f"{text}\n".encode())
        picture.write(image.getvalue())
    return path


def shortened(name: str, length: int) -> str:
    """At most so many characters, of both ends: names often begin alike."""
    if len(name) <= length:
        return name
    end = (length - 1) // 3
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"
