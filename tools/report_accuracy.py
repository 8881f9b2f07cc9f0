"""The evaluations of a run, as HTML tables: accuracy by the amount of labels, then each figure with what it stands on.

Reads the JSON files that `train/evaluate.py` wrote; docs/guides/evaluation.md explains their keys.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluation.results import ALL_LABELS, FORMAT, labels_in_words, options_of

Record = dict[str, Any]

TITLES = (
    "protocol, representation",
    "labels",
    "seeds",
    "top-1",
    "95 % interval",
    "top-5",
    "mean per class",
    "chosen",
)


def read_evaluations(folder: Path) -> list[Record]:
    """What `train/evaluate.py` wrote into a folder, by name.

    Raises:
        ValueError: a file is no JSON.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be the JSON of an evaluation, got a damaged file; evaluate again") from error
        if isinstance(record, dict) and record.get("format") == FORMAT:
            records.append(record)
    return records


def accuracy_tables(folder: Path) -> str:
    """Every evaluation of a run, as HTML.

    Args:
        folder: `evaluation/` of the run; need not be there.
    """
    records = read_evaluations(folder)
    if not records:
        return "<p>Not evaluated yet: <code>python train/evaluate.py --help</code>.</p>"
    names = [name_of(record, records) for record in records]
    return _by_labels(names, records) + _figures(names, records)


def name_of(record: Record, records: list[Record]) -> str:
    """What a record measured, in words that tell it apart from the others."""
    words = _subject(record, records)
    alike = [other for other in records if _subject(other, records) == words]
    for key in ("train_data", *options_of(record)):
        if len({str(other.get(key)) for other in alike}) > 1:
            words.append(f"{key} {record[key]}")
    return ", ".join(words)


def _subject(record: Record, records: list[Record]) -> list[str]:
    """Protocol, network, checkpoint and test set."""
    words = [record["protocol"], record["representation"]]
    if record["suffix"]:
        words.append(record["suffix"])
    if record["weights"] == "average":
        words.append("average of the weights")
    if record["head_layers"]:
        layers = record["head_layers"]
        words.append("z" if layers < 0 else f"{layers} layer{'s' * (layers > 1)} of the head")
    if record["which"] != "latest":
        words.append(f"{record['which']} checkpoint")
    for key, shown in (("checkpoint_step", "step {}"), ("test_data", "on {}")):
        if len({str(other[key]) for other in records}) > 1:
            words.append(shown.format(record[key]))
    return words


def _by_labels(names: list[str], records: list[Record]) -> str:
    """A row an evaluation, a column an amount of labels."""
    counts = list(dict.fromkeys(count for record in records for count in record["accuracy"]))
    counts.sort(key=lambda count: count == ALL_LABELS)  # at the end
    rows = [
        [name, *(_percent(record["accuracy"].get(count)) for count in counts)]
        for name, record in zip(names, records, strict=True)
    ]
    return (
        "<p>Top-1 in percent of the test set, by labels (a class, or a share of all); mean ± standard deviation over "
        f"seeds.</p>{_table(['protocol, representation', *counts], rows)}"
    )


def _figures(names: list[str], records: list[Record]) -> str:
    """A row an evaluation and amount of labels: every figure, and what was chosen."""
    rows = [
        [name, *_cells(record, labels)]
        for name, record in zip(names, records, strict=True)
        for labels in record["figures"]
    ]
    return (
        "<p>Intervals hold 95 %: of one seed for the size of the test set (Wilson), of several for their mean "
        f"(Student).</p>{_table(TITLES, rows)}"
    )


def _table(titles: Sequence[str], rows: list[list[str]]) -> str:
    lines = [_row("th", titles), *(_row("td", row) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cells(record: Record, labels: str) -> list[str]:
    figures = record["figures"][labels]
    low, high = figures["top1"]["confidence_interval"]
    chosen = ", ".join(f"{name} {value}" for name, value in record["chosen"].items())
    return [
        labels_in_words(labels),
        str(figures["num_seeds"]),
        f"{100 * figures['top1']['mean']:.1f}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * figures['top5']['mean']:.1f}",
        f"{100 * figures['mean_per_class']['mean']:.1f}",
        f"{chosen}; {record['chosen_by']}" if chosen else "",
    ]


def _percent(figure: dict[str, float] | None) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['std']:.1f}" if figure else ""
