"""Training curves of several runs, with a band over the seeds of each group.

Runs are grouped by a label: the one that is given as LABEL=RUN; else by their configuration, where those that differ
in nothing but name and seed are one group, and the label says in what the groups differ. At every step that all runs
of a group have written: their mean, and Student's 95 % confidence interval of it, mean ± t(0.975, n − 1) · s / √n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tools.pictures_canvas import COLORS, Drawn, new_figure, shortened
from tools.report_curves import CURVES
from train.config import config_from_dict, flatten, is_adjustable, read_run_config, resolved_dict
from train.evaluation.classification import LEVEL, over_seeds
from train.metrics import METRICS_FILE, read_metrics

INCIDENTAL = ("name", "seed")  # what runs of one group may differ in, beside what changes no curve
MAX_LABEL = 48  # characters
LINES = ("-", "--", "-.", ":")
MAX_PANELS_IN_ROW = 3
LOGGED = ("step", "epoch")  # of every line: where it stands, no metric


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Which runs are compared, and in what."""

    runs: tuple[str, ...]
    """Run directories, each as RUN or LABEL=RUN: `a b c` or `[a,b,c]`. Without labels, runs that differ in name and
    seed alone are one group."""
    metrics: tuple[str, ...] = ()
    """Of `metrics.jsonl`; by default those of `loss`, `contrastive_accuracy`, `probe_accuracy` and `knn_accuracy` that
    all runs have."""
    out: str | None = None
    """A folder; by default `pictures/` of the first run."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("`runs` must name at least one run directory, got none")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it is drawn."""

    path: Path
    label: str | None
    config: dict[str, Any]
    """Its configuration, flat."""
    lines: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Band:
    """A metric of a group, at the steps that all of its runs have: each array is float64 [n]."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]
    """Of the confidence interval; 0 of a single run."""
    num_runs: int


def draw(config: CurvesConfig) -> Drawn:
    """Draw a panel a metric, a line a group.

    Raises:
        ValueError: a directory holds no run, or the runs have no metric in common.
    """
    runs = [read_run(word) for word in config.runs]
    metrics = config.metrics or _usual_metrics(runs)
    groups = group_runs(runs)
    if len(groups) > len(COLORS) * len(LINES):
        raise ValueError(
            f"`runs` must form at most {len(COLORS) * len(LINES)} groups, got {len(groups)}; compare fewer"
        )
    bands = {metric: {label: band(members, metric) for label, members in groups.items()} for metric in metrics}

    columns = min(len(metrics), MAX_PANELS_IN_ROW)
    rows = math.ceil(len(metrics) / columns)
    figure = new_figure(max(7.0, 4.6 * columns), 1.6 + 3.4 * rows, "", _explanation(groups))
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, (metric, by_label) in zip(panels, bands.items(), strict=False):
        _draw_panel(panel, metric, by_label)
    for unused in panels[len(metrics) :]:
        unused.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(len(labels), columns),
        title="Training curves",  # the figure's own title would lie under the legend
        title_fontproperties={"weight": "bold", "size": 13},
        alignment="left",
    )
    numbers = {
        "picture": "curves",
        "confidence": LEVEL,
        "groups": {label: [str(run.path) for run in members] for label, members in groups.items()},
        "curves": {
            metric: {label: _numbers(one) for label, one in by_label.items()} for metric, by_label in bands.items()
        },
    }
    folder = Path(config.out) if config.out else runs[0].path / "pictures"
    return Drawn(figure=figure, numbers=numbers, folder=folder, name="curves")


def read_run(word: str) -> Run:
    """A run by RUN or LABEL=RUN.

    Raises:
        ValueError: there is no run, or it has written no metrics.
    """
    label, separator, path = word.rpartition("=")
    if separator and Path(word).is_dir():  # a directory with a = in its name
        label, path = "", word
    folder = Path(path)
    config = config_from_dict(read_run_config(folder))  # an option that is newer than the run had its default's effect
    lines = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    if not lines:
        raise ValueError(f"`runs` must have metrics, got {folder} without any in {METRICS_FILE}; train it first")
    return Run(path=folder, label=label or None, config=flatten(resolved_dict(config)), lines=lines)


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, in the order in which labels first occur.

    Raises:
        ValueError: some runs have a label and others none, or a run occurs twice.
    """
    paths = [run.path.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"`runs` must name each run once, got {path} twice")
    labelled = [run.label is not None for run in runs]
    if any(labelled) and not all(labelled):
        raise ValueError(f"`runs` must all have labels or none, got {runs[labelled.index(False)].path} without one")
    groups: dict[str, list[Run]] = {}
    if all(labelled):
        for run in runs:
            groups.setdefault(run.label or "", []).append(run)
        return groups
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps(_essence(run), sort_keys=True), []).append(run)
    for members in alike.values():
        label = _label(members, runs)
        groups[label if label not in groups else str(members[0].path)] = members
    return groups


def band(runs: Sequence[Run], metric: str) -> Band:
    """Mean and confidence interval of a metric over runs, at the steps that all of them have.

    Raises:
        ValueError: a run lacks the metric, or the runs have no step in common.
    """
    found = []
    for run in runs:
        values = {line["step"]: line[metric] for line in run.lines if metric in line}
        if not values:
            known = sorted({name for line in run.lines for name in line} - set(LOGGED))
            raise ValueError(f"`metrics` must be of every run; {run.path} has no {metric}, but {', '.join(known)}")
        found.append(values)
    steps = sorted(set.intersection(*(set(values) for values in found)))
    if not steps:
        raise ValueError(
            f"runs of a group must have steps in common, got none at which {runs[0].path} and the others have all "
            f"written {metric}; give them labels of their own"
        )
    figures = [over_seeds([values[step] for values in found]) for step in steps]
    ends = [figure.confidence_interval or (figure.mean, figure.mean) for figure in figures]
    return Band(
        steps=np.array(steps, float),
        mean=np.array([figure.mean for figure in figures]),
        half_width=np.array([(high - low) / 2 for low, high in ends]),
        num_runs=len(runs),
    )


def _usual_metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    common = set.intersection(*({name for line in run.lines for name in line} for run in runs)) - set(LOGGED)
    usual = ("loss", "contrastive_accuracy", "probe_accuracy", "knn_accuracy")
    metrics = tuple(name for name in usual if name in common)
    if not metrics:
        known = [
            f"{run.path}: {', '.join(sorted({n for line in run.lines for n in line} - set(LOGGED)))}" for run in runs
        ]
        raise ValueError(
            f"`runs` must have a metric in common, got none of {', '.join(usual)} in all ({'; '.join(known)})"
        )
    return metrics


def _essence(run: Run) -> dict[str, Any]:
    """What of a configuration makes another curve, but for chance."""
    return {
        key: value
        for key, value in run.config.items()
        if key not in INCIDENTAL and (key == "data.path" or not is_adjustable(key))
    }


def _label(members: Sequence[Run], runs: Sequence[Run]) -> str:
    """In what the configuration of a group differs from others, if that can be said in a few words."""
    run = members[0]
    ours, others = _essence(run), [_essence(other) for other in runs]
    differing = [key for key in sorted(ours) if any(other[key] != ours[key] for other in others)]
    if not differing:
        return "all runs" if len(runs) > 1 else run.path.name
    label = ", ".join(f"{key.rpartition('.')[2]} {ours[key]}" for key in differing)
    return label if len(label) <= MAX_LABEL else ", ".join(member.path.name for member in members)


def _draw_panel(panel: Axes, metric: str, by_label: dict[str, Band]) -> None:
    for i, (label, one) in enumerate(by_label.items()):
        color, line = COLORS[i % len(COLORS)], LINES[(i + i // len(COLORS)) % len(LINES)]
        runs = f"{one.num_runs} seeds" if one.num_runs > 1 else "1 run, no band"
        marker = "o" if len(one.steps) == 1 else None
        text = f"{shortened(label, MAX_LABEL)} ({runs})"
        panel.plot(one.steps, one.mean, line, color=color, marker=marker, label=text, linewidth=1.6)
        if one.num_runs > 1:
            low, high = one.mean - one.half_width, one.mean + one.half_width
            panel.fill_between(one.steps, low, high, color=color, alpha=0.22, linewidth=0.0)
    panel.set(title=CURVES.get(metric, metric), xlabel="optimizer step")
    if metric.endswith("accuracy"):
        panel.set_ylim(bottom=0.0)


def _explanation(groups: dict[str, list[Run]]) -> str:
    if max(len(members) for members in groups.values()) == 1:
        return "one run a line: no band"
    return "line: mean over the runs of a group; band: Student's 95 % confidence interval of that mean"


def _numbers(one: Band) -> dict[str, Any]:
    return {
        "num_runs": one.num_runs,
        "step": one.steps.tolist(),
        "mean": _finite(one.mean),
        "half_width": _finite(one.half_width) if one.num_runs > 1 else None,
    }


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    """NaN and infinity, which JSON has no words for, as null."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
