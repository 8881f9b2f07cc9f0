"""The evaluations of runs as tables: accuracy by the amount of labels, each figure with what it stands on, by class.

Reads the JSON files that `train/evaluate.py` wrote; docs/guides/evaluation.md explains their keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from tools.report_page import details, missing, table
from train.evaluation.results import ALL_LABELS, FORMAT, labels_in_words, options_of

Record = dict[str, Any]

MOST_CLASSES = 100  # in a table, the least accurate ones first
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
BASELINES = ("random", "pixels")
KEYS = ("protocol", "representation", "suffix", "weights", "head_layers", "which", "checkpoint_step", "test_data")


def read_evaluations(folder: Path) -> tuple[list[Record], list[str]]:
    """What `train/evaluate.py` wrote into a folder, by name, and what is wrong with the files that cannot be used."""
    records, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if isinstance(record, dict) and record.get("format") == FORMAT:
                _check(record)
                records.append(record)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
            problems.append(f"{path} must be the JSON of an evaluation, got a damaged file; evaluate again")
    return records, problems


def _check(record: Record) -> None:
    """Ask for all that the tables will."""
    for key in (*KEYS, "train_data", "checkpoint", "chosen_by"):
        record[key]
    record["chosen"].items()
    for labels, figures in record["figures"].items():
        _cells(record, labels)
        int(figures["num_test_samples"])
        for one in figures.get("per_class", {}).values():
            _of_class(one)
    for figure in record["accuracy"].values():
        _percent(figure)


def accuracy_tables(
    records: Sequence[Record], problems: Sequence[str] = (), *, run: Path | str = "RUN", is_pretraining: bool = True
) -> str:
    """Every evaluation of a run, as HTML."""
    if not records and not problems and not is_pretraining:
        return missing("An evaluation trains this network, and says in its own result how good it is.")
    said = "".join(missing(problem) for problem in problems)
    if not records:
        words = f"--checkpoint {quote(str(run))} --train_data data/train.beton --test_data data/test.beton"
        command = f"python train/evaluate.py knn {words}"
        return said + missing("Not evaluated yet. On labelled images, for instance:", command)
    names = [name_of(record, records) for record in records]
    return said + _by_labels(names, records) + _figures(names, records) + _by_class(names, records)


def compared(labels: Sequence[str], records: Sequence[Sequence[Record]]) -> str:
    """The evaluations of several runs: a row an evaluation and amount of labels, a column a run.

    Args:
        labels: of the runs.
        records: of each.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}
    for i, of_run in enumerate(records):
        for record in of_run:
            for amount, figure in record["accuracy"].items():
                found.setdefault((name_of(record, of_run), amount), {})[i] = _percent(figure)
    if not found:
        return missing("None of these runs is evaluated yet:", "python train/evaluate.py --help")
    rows = [
        [f"{name}, {labels_in_words(amount).strip()}", *(by_run.get(i, "–") for i in range(len(labels)))]
        for (name, amount), by_run in found.items()
    ]
    caption = "Top-1 in percent of the test set; mean ± standard deviation over seeds"
    return table(caption, ["evaluation", *labels], rows)


def best_record(records: Sequence[Record]) -> Record | None:
    """The learned representation with the highest accuracy from all labels."""
    learned = [record for record in records if record["representation"] not in BASELINES]
    with_all = [record for record in learned if ALL_LABELS in record["figures"]]
    return max(with_all, key=lambda record: float(record["figures"][ALL_LABELS]["top1"]["mean"]), default=None)


def short_name(record: Record) -> str:
    """The protocol, with what tells it from its own other settings."""
    return " ".join(word for word in (record["protocol"], record["suffix"]) if word)


def name_of(record: Record, records: Sequence[Record]) -> str:
    """What a record measured, in words that tell it apart from the others."""
    words = _subject(record, records)
    alike = [other for other in records if _subject(other, records) == words]
    for key in ("train_data", *options_of(record)):
        if len({_plain(other.get(key)) for other in alike}) > 1:
            words.append(f"{key} {_plain(record[key])}")
    return ", ".join(words)


def _subject(record: Record, records: Sequence[Record]) -> list[str]:
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
        if len({_plain(other[key]) for other in records}) > 1:
            words.append(shown.format(_plain(record[key])))
    return words


def _plain(value: Any) -> str:
    """A value in words; `./a` and `a` are one path."""
    return os.path.normpath(value) if isinstance(value, str) and value else str(value)


def _by_labels(names: Sequence[str], records: Sequence[Record]) -> str:
    """A row an evaluation, a column an amount of labels."""
    counts = list(dict.fromkeys(count for record in records for count in record["accuracy"]))
    counts.sort(key=lambda count: count == ALL_LABELS)  # at the end
    rows = [
        [name, *(_percent(record["accuracy"].get(count)) for count in counts)]
        for name, record in zip(names, records, strict=True)
    ]
    caption = (
        "Top-1 in percent of the test set, by labels (a class, or a share of all); mean ± standard deviation over seeds"
    )
    return table(caption, ["protocol, representation", *counts], rows)


def _figures(names: Sequence[str], records: Sequence[Record]) -> str:
    """A row an evaluation and amount of labels: every figure, and what was chosen."""
    rows = [
        [name, *_cells(record, labels)]
        for name, record in zip(names, records, strict=True)
        for labels in record["figures"]
    ]
    caption = (
        "Intervals hold 95 %: of one seed for the size of the test set (Wilson), of several for their mean (Student)"
    )
    return details("Every figure, with its interval", table(caption, TITLES, rows, kind="last"))


def _by_class(names: Sequence[str], records: Sequence[Record]) -> str:
    """A row a class, a column an evaluation from all labels; closed until it is asked for."""
    shown = [
        (name, record["figures"][ALL_LABELS]["per_class"])
        for name, record in zip(names, records, strict=True)
        if record["figures"].get(ALL_LABELS, {}).get("per_class")
    ]
    if not shown:
        return ""
    first = shown[0][1]
    classes = list(dict.fromkeys(name for _, by_class in shown for name in by_class))
    some = len(classes) > MOST_CLASSES
    if some:
        classes.sort(key=lambda name: _accuracy(first.get(name)))
    rows = [[name, *(_of_class(by_class.get(name)) for _, by_class in shown)] for name in classes[:MOST_CLASSES]]
    which = (
        f"the {MOST_CLASSES} least accurate of {len(classes):,} classes, by {shown[0][0]}" if some else "every class"
    )
    caption = f"Right, in percent of the test images of a class, from all labels: {which}"
    return details("By class", table(caption, ["class", *(name for name, _ in shown)], rows))


def _accuracy(one: Mapping[str, Any] | None) -> float:
    value = one["accuracy"] if one else None
    return 2.0 if value is None else float(value)


def _of_class(one: Mapping[str, Any] | None) -> str:
    value = one["accuracy"] if one else None
    return "–" if value is None else f"{100 * value:.1f}"


def _cells(record: Record, labels: str) -> list[str]:
    figures = record["figures"][labels]
    low, high = figures["top1"]["confidence_interval"] or (figures["top1"]["mean"],) * 2
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


def _percent(figure: Mapping[str, float] | None) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['std']:.1f}" if figure else ""
