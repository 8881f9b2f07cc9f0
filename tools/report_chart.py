"""A line chart as SVG inside the page: it takes the page's colours, scales with its column, and needs no script.

Every chart has a name, a description in words, a tooltip on its points, and its numbers as a table below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from tools.report_numbers import figure, tick_label, ticks
from tools.report_page import details, table, text
from tools.report_series import Series
from tools.report_style import DASHES, NUM_COLORS

WIDTH, HEIGHT = 360, 215
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 36  # around the field
HEADROOM = 0.05  # of the range of values
MOST_HINTS = 24  # points of a line that have a tooltip
MOST_SPOTS = 20  # points of a line that are shown as such
MOST_ROWS = 9  # of the table
Point = TypeVar("Point")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn."""

    key: str
    """A word for it, as an anchor."""
    title: str
    x_name: str
    series: Sequence[tuple[int, Series]]
    """Each with the number of its run, which gives colour and dashes."""
    from_zero: bool = True
    """The axis of values begins at 0 where no value is below."""
    pauses: Sequence[tuple[float, float]] = ()
    """Stretches of x in which nothing was trained."""
    marks: Sequence[tuple[float, str]] = field(default_factory=list)
    """Places on x, each with what happened there."""
    note: str = ""


def line_style(number: int) -> str:
    """Classes of the line of a run: colours in turn, and dashes that go on where colours begin again."""
    return f"c{number % NUM_COLORS} d{(number + number // NUM_COLORS) % len(DASHES)}"


def key_of_line(number: int) -> str:
    """A short piece of a run's line, for legends."""
    return (
        '<svg class="key" viewBox="0 0 36 10" aria-hidden="true">'
        f'<path class="run {line_style(number)}" d="M0 5H36"/></svg>'
    )


def draw(chart: Chart) -> str:
    """The chart with its caption and its table; nothing where there is no finite value."""
    shown = [(number, one) for number, one in chart.series if np.isfinite(one.mean).any()]
    if not shown:
        return ""
    scale = _Scale(chart, [one for _, one in shown])
    described = "; ".join(_in_words(one, alone=len(shown) == 1) for _, one in shown)
    parts = [
        *(_pause(scale, pause) for pause in chart.pauses),
        *_axes(scale, chart.x_name),
        *(_mark(scale, mark) for mark in chart.marks),
        *(_line(scale, number, one, chart) for number, one in shown),
    ]
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(f"{chart.title} by {chart.x_name}")}: '
        f'{text(described)}">{"".join(parts)}</svg>'
    )
    caption = f"<b>{text(chart.title)}</b> {text(described)}. {text(_honestly(chart, shown))}"
    return f"<figure><figcaption>{caption}</figcaption>{drawing}{_table(chart, shown)}</figure>"


class _Scale:
    """From values to places in the drawing."""

    def __init__(self, chart: Chart, shown: Sequence[Series]) -> None:
        xs = np.concatenate([one.x for one in shown])
        self.x_low, self.x_high = _room(float(xs.min()), float(xs.max()), flat=1.0)
        low = min(float(np.nanmin(one.low)) for one in shown)
        high = max(float(np.nanmax(one.high)) for one in shown)
        is_based = chart.from_zero and low >= 0.0
        self.low, self.high = _room(0.0 if is_based else low, high, flat=abs(high) or 1.0)
        margin = HEADROOM * (self.high - self.low)
        self.low, self.high = self.low - (0.0 if is_based else margin), self.high + margin

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _room(low: float, high: float, *, flat: float) -> tuple[float, float]:
    """An axis on which the two differ."""
    return (low, high) if high - low > 1e-12 * max(abs(low), abs(high)) else (low - flat / 2, high + flat / 2)


def _axes(scale: _Scale, x_name: str) -> list[str]:
    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    rows = ticks(scale.low, scale.high)
    for value in rows:
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>')
        label = tick_label(value, _step(rows))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text(label)}</text>')
    columns = ticks(scale.x_low, scale.x_high, 5)
    for value in columns:
        x = scale.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        anchor = "end" if x > end - 12 else "middle"
        label = tick_label(value, _step(columns))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{text(label)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{end}"/>')
    parts.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_name)}</text>')
    return parts


def _step(values: Sequence[float]) -> float:
    return values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0


def _pause(scale: _Scale, pause: tuple[float, float]) -> str:
    left, right = scale.x(pause[0]), scale.x(pause[1])
    return f'<rect class="pause" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'


def _mark(scale: _Scale, mark: tuple[float, str]) -> str:
    x = scale.x(mark[0])
    return (
        f'<g><title>{text(mark[1])}</title><path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{TOP + 7}" text-anchor="middle">↻</text></g>'
    )


def _line(scale: _Scale, number: int, one: Series, chart: Chart) -> str:
    known = np.isfinite(one.mean)
    points = [(scale.x(x), scale.y(y)) if ok else None for x, y, ok in zip(one.x, one.mean, known, strict=True)]
    edges = [
        (scale.x(x), scale.y(low), scale.y(high)) if ok else None
        for x, low, high, ok in zip(one.x, one.low, one.high, known, strict=True)
    ]
    parts = []
    if one.values_per_point > 1:
        spans = "".join(_span([edge for edge in part if edge]) for part in _parts(edges))
        parts.append(f'<path class="span f{number % NUM_COLORS}" d="{spans}"/>')
    path = "".join(_stroke([point for point in part if point]) for part in _parts(points))
    parts.append(f'<path class="run {line_style(number)}" stroke-linecap="round" d="{path}"/>')
    finite = np.flatnonzero(known)
    kind, size = ("spot", 2.5) if len(finite) <= MOST_SPOTS else ("hit", 5)
    for i in np.unique(finite[np.linspace(0, len(finite) - 1, min(MOST_HINTS, len(finite))).round().astype(int)]):
        said = f"{one.label}: {figure(one.mean[i])} at {_place(chart.x_name, one.x[i])}"
        place = f'cx="{scale.x(one.x[i]):.1f}" cy="{scale.y(one.mean[i]):.1f}" r="{size}"'
        parts.append(f'<circle class="{kind} f{number % NUM_COLORS}" {place}><title>{text(said)}</title></circle>')
    return f"<g>{''.join(parts)}</g>"


def _place(x_name: str, x: float) -> str:
    """`step 12`, or `1.5 minutes since the start`."""
    return f"{figure(x)} {x_name}" if " " in x_name else f"{x_name} {figure(x)}"


def _parts(points: Sequence[Point | None]) -> list[list[Point]]:
    """The stretches between what is missing."""
    found: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            found.append([])
        else:
            found[-1].append(point)
    return [part for part in found if part]


def _stroke(points: Sequence[tuple[float, float]]) -> str:
    """Straight pieces; a point by itself becomes a dot."""
    if len(points) == 1:
        x, y = points[0]
        return f"M{x - 1:.1f} {y:.1f}h2"
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _span(edges: Sequence[tuple[float, float, float]]) -> str:
    there = [f"{x:.1f} {high:.1f}" for x, _, high in edges]
    back = [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(edges)]
    return f"M{'L'.join([*there, *back])}Z"


def _in_words(one: Series, *, alone: bool) -> str:
    """Where a line ends."""
    return f"ends at {figure(one.last)}" if alone else f"{one.label} ends at {figure(one.last)}"


def _honestly(chart: Chart, shown: Sequence[tuple[int, Series]]) -> str:
    """What the drawing leaves out, and what is missing from it."""
    words = [chart.note] if chart.note else []
    most = max(one.values_per_point for _, one in shown)
    if most > 1:
        words.append(f"Means of {most:,} lines, and their range.")
    left_out = sum(one.num_left_out for _, one in chart.series)
    if left_out:
        words.append(f"{left_out:,} values are not finite, and not drawn.")
    return " ".join(words)


def _table(chart: Chart, shown: Sequence[tuple[int, Series]]) -> str:
    """A few of the numbers, at places along x; of each line the last one drawn up to there."""
    places = np.unique(np.concatenate([one.x[np.isfinite(one.mean)] for _, one in shown]))
    chosen = places[np.unique(np.linspace(0, len(places) - 1, min(MOST_ROWS, len(places))).round().astype(int))]
    rows = [[figure(x), *(_up_to(one, x) for _, one in shown)] for x in chosen]
    titles = [chart.x_name, *(one.label if len(shown) > 1 else chart.title for _, one in shown)]
    return details("Numbers", table(f"{chart.title} by {chart.x_name}", titles, rows))


def _up_to(one: Series, x: float) -> str:
    known = np.isfinite(one.mean)
    before = one.mean[known & (one.x <= x)]
    return figure(float(before[-1])) if len(before) and x <= one.x[known][-1] else "–"
