"""The first thing that a report says of a run: what it is, how far it came, how fast, how good.

And, of several runs, the same beside each other, and in what their configurations differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.report_accuracy import Record, best_record, short_name
from tools.report_clock import Clock
from tools.report_curves import mean_wait
from tools.report_numbers import count, duration, figure, percent
from tools.report_page import figures, missing, table
from tools.report_runs import RunRecord
from tools.report_settings import NO_DEFAULT, shown
from train.config import flatten, is_adjustable, resolved_dict

Figure = tuple[str, str, str]
"""Name, value, and a few words to it."""


def status(run: RunRecord) -> tuple[str, str]:
    """How far a run came, and what that means."""
    total, step = run.total_steps, run.step
    of = f" of {total:,}" if total else ""
    if run.is_running:
        return "still running", f"step {step:,}{of} so far; report again when it has ended"
    if run.is_finished:
        return "finished", f"all {step:,} steps"
    if not step:
        return "no step finished", "no line of metrics, and no checkpoint"
    saved = f"; it resumes from step {run.saved_step:,}" if run.checkpoint else "; it has no checkpoint"
    return "interrupted", f"at step {step:,}{of}{saved}"


def what(run: RunRecord) -> str:
    """Method, network and data in a line."""
    stored = run.stored
    encoder = f"ResNet-{stored.get('model.encoder.depth', '?')}"
    width = stored.get("model.encoder.width", 1.0)
    wide = f" of width {width}" if width != 1.0 else ""
    kernels = " with selective kernels" if stored.get("model.encoder.selective_kernel") else ""
    side = stored.get("augment.size", "?")
    return (
        f"{stored.get('model.method', 'simclr')}, {encoder}{wide}{kernels}, views of {side} × {side} pixels, "
        f"batches of {run.global_batch_size:,} images of {stored.get('data.path', '?')}"
    )


def summary_figures(run: RunRecord, clock: Clock, records: Sequence[Record]) -> list[Figure]:
    """The summary of a run."""
    images = run.step * run.global_batch_size
    found: list[Figure] = [("status", *status(run)), _images(run, images)]
    if clock.total_trained > 0.0:
        found.append(_time(clock))
        trained_images = float((clock.trained > 0.0) @ np.diff(run.lines.step, prepend=0.0)) * run.global_batch_size
        found.append(("images a second", figure(trained_images / clock.total_trained), "source images, all ranks"))
        if wait := mean_wait(run, clock):
            found.append(("waiting for data", wait, "of the training time"))
    if loss := _loss(run):
        found.append(loss)
    if best := best_record(records):
        top1 = best["figures"]["all"]["top1"]["mean"]
        found.append(
            (
                "top-1 accuracy",
                percent(top1),
                f"{short_name(best)}, {best['figures']['all']['num_test_samples']:,} test images",
            )
        )
    found += [
        (title, percent(float(run.lines.columns[name][1][-1])), "the last measured while it trained")
        for name, title in (("probe_accuracy", "online probe"), ("knn_accuracy", "online neighbours"))
        if name in run.lines.columns
    ]
    return found


def _images(run: RunRecord, images: int) -> Figure:
    if not run.steps_per_epoch:
        return "images seen", count(images), "each time that one was seen"
    in_epoch = run.steps_per_epoch * run.global_batch_size
    return "images seen", count(images), f"{figure(images / in_epoch)} epochs of {count(in_epoch)}"


def _time(clock: Clock) -> Figure:
    if not clock.is_wall:
        return "training time", duration(clock.total_trained), "of all steps; pauses are not recorded"
    return "training time", duration(clock.total_trained), f"{duration(clock.total)} by the clock, pauses included"


def _loss(run: RunRecord) -> Figure | None:
    if "loss" not in run.lines.columns:
        return None
    values = run.lines.columns["loss"][1]
    last = [float(value) for value in values[-max(1, len(values) // 50) :] if math.isfinite(value)]
    note = f"mean of the last {len(last):,} lines {figure(statistics.fmean(last))}" if len(last) > 1 else ""
    return "last loss", figure(float(values[-1])), note


def summary_tiles(run: RunRecord, clock: Clock, records: Sequence[Record]) -> str:
    """The summary of one run, with what is amiss."""
    return figures(summary_figures(run, clock, records)) + "".join(missing(problem) for problem in run.problems)


def summary_table(runs: Sequence[RunRecord], clocks: Sequence[Clock], records: Sequence[Sequence[Record]]) -> str:
    """The summaries of several runs: a column a run."""
    found = [
        {name: (value, note) for name, value, note in summary_figures(*one)}
        for one in zip(runs, clocks, records, strict=True)
    ]
    names = list(dict.fromkeys(name for figures_of_run in found for name in figures_of_run))
    rows = []
    for name in names:
        cells = [figures_of_run.get(name, ("–", "")) for figures_of_run in found]
        rows.append([name, *(f"{value} ({note})" if name == "status" else value for value, note in cells)])
    rows.append(["what", *(what(run) for run in runs)])
    amiss = "".join(missing(f"{run.label}: {problem}") for run in runs for problem in run.problems)
    return table("The runs beside each other", ["", *(run.label for run in runs)], rows, kind="words") + amiss


def differences_between(runs: Sequence[RunRecord]) -> str:
    """In what the configurations differ: a row a field, a column a run."""
    options = [_options(run) for run in runs]
    keys = list(dict.fromkeys(key for of_run in options for key in of_run))
    differing = [key for key in keys if len({repr(of_run.get(key)) for of_run in options}) > 1 and key != "name"]
    if not differing:
        return missing("The configurations differ in nothing but the name.")
    differing.sort(key=is_adjustable)  # what changes a result comes first
    rows = [[key, *(shown(of_run.get(key, NO_DEFAULT)) for of_run in options)] for key in differing]
    return table("Fields that differ", ["field", *(run.label for run in runs)], rows, kind="words")


def _options(run: RunRecord) -> Mapping[str, Any]:
    """Of a run; an option that is newer than it had its default's effect."""
    return run.stored if run.config is None else flatten(resolved_dict(run.config))
