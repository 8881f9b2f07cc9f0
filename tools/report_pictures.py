"""Numbers that `python -m tools.pictures` left beside a run: its confusion matrix and its spectra."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.report_chart import Chart, draw, key_of_line
from tools.report_numbers import figure, percent
from tools.report_page import Section, missing, paragraph, table, text
from tools.report_runs import RunRecord
from tools.report_series import Series, reduced

MOST_IN_MATRIX = 20  # classes, up to which the whole matrix is a table
SMALLEST = 1e-10  # of the largest eigenvalue: below lies rounding

Numbers = dict[str, Any]


def stored_pictures(run: RunRecord, train_data: str, test_data: str) -> list[Section]:
    """The confusion matrix and the spectra of a run, or the commands that would make them."""
    folder, shown = run.path / "pictures", []
    kinds = [("confusion", "Confusion of classes", confusion), ("spectrum", "Spectrum of the head", spectrum)]
    for name, title, show in kinds if run.has_head else kinds[:1]:
        command, not_yet = _command(name, run, train_data, test_data), "Not drawn yet:"
        if name == "confusion":
            not_yet = "Not drawn yet. It takes labelled images:"
        bodies = []
        for path in sorted(folder.glob(f"{name}*.json")):
            try:
                bodies.append(show(json.loads(path.read_text())))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
                bodies.append(missing(f"{path} is damaged. Draw it again:", command))
        body = "".join(bodies) or missing(not_yet, command)
        shown.append(Section(key=name, title=title, body=body))
    return shown


def _command(name: str, run: RunRecord, train_data: str, test_data: str) -> str:
    """Confusion takes two labelled sets; the spectrum of the head none, and those of h and z the one to look at."""
    words = ["python", "-m", "tools.pictures", name, "--checkpoint", str(run.path)]
    if name == "confusion":
        words += ["--train_data", train_data]
    if name == "confusion" or Path(test_data).exists():
        words += ["--test_data", test_data]
    return shlex.join(words)


def confusion(numbers: Numbers) -> str:
    """A row a true class: in percent of it, what its images were taken for."""
    names = [str(name) for name in numbers["classes"]]
    counts = np.array(numbers["counts"], np.int64).reshape(len(names), len(names))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    how = f"{numbers['classifier']} on h, step {numbers['step']}, {percent(float(numbers['accuracy']))} right"
    if len(names) <= MOST_IN_MATRIX:
        rows = [
            [name, *(f"{100 * share:.0f}" if share >= 0.005 else "·" for share in row)]
            for name, row in zip(names, shares, strict=True)
        ]
        return table(f"Confusion matrix ({how}): percent of the true class in a row", ["true class", *names], rows)
    rows = [[str(one["true"]), str(one["taken_for"]), percent(float(one["share"]))] for one in numbers["largest"]]
    return table(f"Largest confusions ({how})", ["true class", "taken for", "share of the true class"], rows)


def spectrum(numbers: Numbers) -> str:
    """Squared singular values of every layer of the head, and the eigenvalues of covariances, by rank."""
    layers = [(f"layer {one['layer']}", one) for one in numbers["squared_singular_values"]]
    spread = [(f"{name}", one) for name, one in numbers["covariance"].items()]
    charts = [
        _spectrum("head", "squared singular values of the head, log10 of their share", layers, "values"),
        _spectrum(
            "covariance", "eigenvalues of the covariance of h and z, log10 of their share", spread, "eigenvalues"
        ),
    ]
    said = f"Step {numbers['step']}. Effective ranks: " + ", ".join(
        f"{name} {figure(float(one['effective_rank']))} of {len(one.get('values') or one['eigenvalues'])}"
        for name, one in [*layers, *spread]
    )
    return f'{paragraph(said + ".")}<div class="curves">{"".join(charts)}</div>'


def _spectrum(key: str, title: str, named: Sequence[tuple[str, Numbers]], values: str) -> str:
    series: list[tuple[int, Series]] = []
    for i, (name, one) in enumerate(named):
        found = np.array(one[values], np.float64)
        kept = found[found > SMALLEST * found.max(initial=0.0)]
        logs = np.log10(kept / kept.sum()) if len(kept) else kept
        series.append((i, reduced(name, np.arange(1.0, len(logs) + 1), logs)))
    if not series:
        return ""
    items = "".join(f"<li>{key_of_line(i)}{text(one.label)}</li>" for i, one in series)
    drawn = draw(Chart(key=key, title=title, x_name="rank", series=series, from_zero=False))
    return f'<div>{drawn}<ul class="legend">{items}</ul></div>'


def data_for_pictures(run: RunRecord, records: Sequence[Numbers], test_data: str | None) -> tuple[str, str]:
    """Sets for the commands that draw pictures: those of an evaluation, else names to be replaced."""
    train = next((record["train_data"] for record in records if record["train_data"]), None)
    test = test_data or next((record["test_data"] for record in records if record["test_data"]), None)
    fallback = Path(str(run.stored.get("data.path") or "data/train.beton"))
    return train or str(fallback), test or "data/test.beton"
