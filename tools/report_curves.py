"""The curves of a report: what was learned by step, and throughput by time, of one run or of several overlaid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.report_chart import Chart, draw, key_of_line
from tools.report_clock import Clock, unit_for
from tools.report_numbers import duration, percent
from tools.report_page import missing, paragraph, table, text
from tools.report_runs import RunRecord
from tools.report_series import MOST_POINTS, Series, reduced
from train.metrics import METRICS_FILE, TIME

CURVES = {
    "loss": "loss",
    "contrastive_accuracy": "contrastive accuracy",
    "probe_accuracy": "accuracy of the online probe",
    "knn_accuracy": "accuracy of nearest neighbours",
    "accuracy": "accuracy on the training batch",
    "representation_std": "spread of the representations",
    "projection_std": "spread of the projections",
    "projection_rank": "rank of the projections",
    "lr": "learning rate",
    "images_per_sec": "source images a second",
    "data_wait": "share of time waiting for data",
}
THROUGHPUT = ("images_per_sec", "data_wait")
NO_CURVE = ("epoch", TIME, *THROUGHPUT)
MOST_OTHERS = 12  # metrics that no title is known for
MOST_PAUSES = 20  # in the table


def legend(runs: Sequence[RunRecord]) -> str:
    """Which line is whose; nothing for one run."""
    if len(runs) < 2:
        return ""
    items = "".join(f"<li>{key_of_line(i)}{text(run.label)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend" aria-label="Lines">{items}</ul>'


def training_curves(runs: Sequence[RunRecord]) -> str:
    """Every metric by step."""
    charts = "".join(_by_step(name, runs) for name in metrics_of(runs))
    if not charts:
        return missing(f"There are no metrics yet: a line is written to {METRICS_FILE} every `train.log_every` steps.")
    without = [run.label for run in runs if not len(run.lines.step)]
    said = paragraph(f"Without metrics yet: {', '.join(without)}.") if without else ""
    if any(len(run.lines.step) > MOST_POINTS for run in runs):
        said += paragraph(
            f"Where there are more than {MOST_POINTS} lines, a point is the mean of neighbouring ones, and a band "
            "spans the lowest and the highest of them."
        )
    return f'{said}{legend(runs)}<div class="curves">{charts}</div>'


def metrics_of(runs: Sequence[RunRecord]) -> list[str]:
    """What is drawn by step: known metrics first, then others by name."""
    found = {name for run in runs for name in run.lines.columns} - set(NO_CURVE)
    others = sorted(found - set(CURVES))[:MOST_OTHERS]
    return [name for name in CURVES if name in found] + others


def _by_step(name: str, runs: Sequence[RunRecord]) -> str:
    series: list[tuple[int, Series]] = []
    for i, run in enumerate(runs):
        if name in run.lines.columns:
            rows, values = run.lines.columns[name]
            series.append((i, reduced(run.label, run.lines.step[rows.astype(np.int64)], values)))
    title = CURVES.get(name, name)
    return draw(Chart(key=name, title=title, x_name="step", series=series, from_zero=name != "loss"))


def throughput_curves(runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> str:
    """Images a second and the wait for data, by time."""
    unit, scale = unit_for(clocks)
    is_wall = all(clock.is_wall for clock in clocks if len(clock.seconds))
    x_name = f"{unit} since the start" if is_wall else f"{unit} of training"
    charts = "".join(_by_time(name, runs, clocks, x_name, scale) for name in THROUGHPUT)
    if not charts:
        return missing("There is no throughput yet: it is measured between two lines of metrics.")
    if is_wall:
        note = "By the clock: grey stretches are pauses, in which nothing was trained; ↻ marks a resume."
    else:
        note = "These metrics carry no time: steps stand one after another, as if there had been no pause. ↻: a resume."
    rows = [_pauses_of(run, clock) for run, clock in zip(runs, clocks, strict=True)]
    listed = [row for rows_of_run in rows for row in rows_of_run]
    pauses = table("Pauses", ["run", "after step", "began", "lasted", ""], listed[:MOST_PAUSES]) if listed else ""
    more = paragraph(f"{len(listed) - MOST_PAUSES:,} more.") if len(listed) > MOST_PAUSES else ""
    return f'{paragraph(note)}{legend(runs)}<div class="curves">{charts}</div>{pauses}{more}'


def _by_time(name: str, runs: Sequence[RunRecord], clocks: Sequence[Clock], x_name: str, scale: float) -> str:
    series, marks = [], []
    for i, (run, clock) in enumerate(zip(runs, clocks, strict=True)):
        if name not in run.lines.columns:
            continue
        x = clock.seconds / scale
        rows = run.lines.columns[name][0].astype(np.int64)
        breaks = [int(np.searchsorted(rows, line)) for line in clock.pauses]
        series.append((i, reduced(run.label, x[rows], run.lines.column(name)[rows], breaks=breaks)))
        for line in clock.resumed:
            done = int(run.lines.step[line - 1]) if line else 0
            began = (clock.seconds[line] - clock.trained[line]) / scale
            marks.append((float(began), f"{run.label} resumed after step {done:,}"))
    pauses = [pause for clock in clocks for pause in _stretches(clock, scale)] if len(runs) == 1 else []
    return draw(Chart(key=name, title=CURVES[name], x_name=x_name, series=series, pauses=pauses, marks=marks))


def _stretches(clock: Clock, scale: float) -> list[tuple[float, float]]:
    return [
        (float(clock.seconds[line - 1]) / scale, float(clock.seconds[line] - clock.trained[line]) / scale)
        for line in clock.pauses
    ]


def _pauses_of(run: RunRecord, clock: Clock) -> list[list[str]]:
    return [
        [
            run.label,
            f"{run.lines.step[line - 1]:,.0f}",
            f"{duration(float(clock.seconds[line - 1]))} after the start",
            duration(clock.pause_seconds(line)),
            "then resumed" if line in clock.resumed else "evaluation, checkpoint or another wait",
        ]
        for line in clock.pauses
    ]


def mean_wait(run: RunRecord, clock: Clock) -> str:
    """The share of all training time that was spent waiting for data."""
    waited = run.lines.column("data_wait")
    known = np.isfinite(waited) & (clock.trained > 0.0)
    total = float(clock.trained[known].sum())
    return percent(float((waited[known] * clock.trained[known]).sum()) / total) if total else ""
