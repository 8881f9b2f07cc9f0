"""A run, or several side by side, as one self-contained page.

    python -m tools.report runs/photos                              # writes runs/photos/report.html
    python -m tools.report runs/a runs/b runs/c --out compare.html
    python -m tools.report runs/photos --test_data data/test.beton  # the set for the map and the neighbours

The page loads nothing and runs nothing. What a run lacks is said in its place, with the command that would make it.
docs/guides/report.md says what each part shows.

Exit codes: 0 written; 2 bad input, and then nothing was written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

# Read once, when torch is loaded: its threads soon sleep where they wait for one another (see train/evaluate.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from tools.report_accuracy import Record, accuracy_tables, compared, read_evaluations
from tools.report_chart import line_style
from tools.report_clock import Clock, clock_of
from tools.report_curves import throughput_curves, training_curves
from tools.report_learned import look
from tools.report_page import Section, missing, page, table
from tools.report_pictures import data_for_pictures, stored_pictures
from tools.report_runs import RunRecord, read_run, read_runs
from tools.report_settings import again, configuration, environment
from tools.report_sheet import contact_sheet
from tools.report_style import DASHES, NUM_COLORS
from tools.report_summary import differences_between, status, summary_table, summary_tiles, what
from tools.whole_file import clean_termination, whole_file
from train.cli import run
from train.config import CONFIG_FILE

REPORT = "report.html"
MOST_RUNS = len({line_style(i) for i in range(NUM_COLORS * len(DASHES))})  # told apart by colour and dashes


@dataclass(frozen=True, kw_only=True, eq=False)
class Reported:
    """A run, and what is derived from it."""

    run: RunRecord
    clock: Clock
    records: list[Record]
    damaged: list[str]
    """What is wrong with evaluations that cannot be read."""


def write_report(
    run_dir: Path, *others: Path, out: Path | None = None, test_data: str | None = None, pictures: bool = True
) -> Path:
    """Write the report of a run, or of several.

    Args:
        run_dir: of the run.
        others: of runs to compare it with.
        out: the file; by default `report.html` in the run's directory, or, of several, beside the first run's.
        test_data: images for the map and the neighbours; by default those of an evaluation, or of the training.
        pictures: draw views, the map and neighbours, for which images are read and an encoder is run.

    Returns:
        The file.

    Raises:
        ValueError: a directory holds no run, or there are too many.
        OSError: it could not be written.
    """
    paths = [run_dir, *others]
    if len(paths) > MOST_RUNS:
        raise ValueError(f"RUN must name at most {MOST_RUNS} runs, got {len(paths)}; compare fewer")
    if test_data is not None and not Path(test_data).exists():
        raise ValueError(f"`--test_data` must name a .beton or a folder of images, {test_data} is not here")
    path = out or (run_dir / REPORT if not others else run_dir.parent / REPORT)
    runs = read_runs(paths)
    if not path.parent.is_dir():
        raise ValueError(f"`--out` must lie in a folder that exists, got {path}; make {path.parent}")
    reported = [_reported(found) for found in runs]
    names = ", ".join(one.run.label for one in reported)
    sections = _one(reported[0], test_data, pictures) if not others else _several(reported, test_data, pictures)
    subtitle = what(reported[0].run) if not others else f"{len(reported)} runs side by side"
    text = page(f"Report of {names}", subtitle, sections)
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def _reported(found: RunRecord) -> Reported:
    records, damaged = read_evaluations(found.path / "evaluation")
    return Reported(run=found, clock=clock_of(found), records=records, damaged=damaged)


def _one(one: Reported, test_data: str | None, pictures: bool) -> list[Section]:
    """The whole page of one run."""
    found = one.run
    return [
        Section(key="summary", title="Summary", body=summary_tiles(found, one.clock, one.records)),
        Section(key="accuracy", title="Accuracy", body=_accuracy(one)),
        Section(key="training", title="Training", body=training_curves([found])),
        Section(key="throughput", title="Throughput", body=throughput_curves([found], [one.clock])),
        *_seen(one, test_data, pictures),
        *_settings(one),
    ]


def _accuracy(one: Reported) -> str:
    return accuracy_tables(one.records, one.damaged, run=one.run.path, is_pretraining=one.run.has_head)


def _several(reported: Sequence[Reported], test_data: str | None, pictures: bool) -> list[Section]:
    """The page of several runs: what can be compared first, then each by itself."""
    runs, clocks = [one.run for one in reported], [one.clock for one in reported]
    records, labels = [one.records for one in reported], [one.run.label for one in reported]
    return [
        Section(key="summary", title="Summary", body=summary_table(runs, clocks, records)),
        Section(key="accuracy", title="Accuracy", body=compared(labels, records)),
        Section(key="training", title="Training", body=training_curves(runs)),
        Section(key="throughput", title="Throughput", body=throughput_curves(runs, clocks)),
        Section(key="differences", title="Differences in configuration", body=differences_between(runs)),
        *(
            Section(
                key=f"run-{i}",
                title=one.run.label,
                body=summary_tiles(one.run, one.clock, one.records),
                parts=[
                    Section(
                        key="accuracy",
                        title="Every evaluation",
                        body=_accuracy(one),
                    ),
                    *_seen(one, test_data, pictures),
                    *_settings(one),
                ],
            )
            for i, one in enumerate(reported)
        ),
    ]


def _seen(one: Reported, test_data: str | None, pictures: bool) -> list[Section]:
    """What went into the model, and what came out of it."""
    found = one.run
    train_data, shown_data = data_for_pictures(found, one.records, test_data)
    stored = stored_pictures(found, train_data, shown_data)
    if not pictures:
        said = missing("Left out by --no-pictures:", f"python -m tools.report {quote(str(found.path))}")
        return [Section(key="pictures", title="Views, map and neighbours", body=said), *stored]
    sheet = "" if found.config is None else contact_sheet(found.config, found.path)
    return [
        Section(key="views", title="What the model sees", body=sheet or missing("Its configuration cannot be read.")),
        *look(found, one.records, test_data),
        *stored,
    ]


def _settings(one: Reported) -> list[Section]:
    found = one.run
    inner = _inner_runs(found)
    return [
        *([Section(key="inner", title="Runs of its evaluations", body=inner)] if inner else []),
        Section(key="configuration", title="Configuration", body=configuration(found)),
        Section(key="environment", title="Environment", body=environment(found)),
        Section(key="again", title="Train it again", body=again(found)),
    ]


def _inner_runs(outer: RunRecord) -> str:
    """Networks that evaluations trained: runs in the run's own folder of results."""
    rows = []
    for path in sorted((outer.path / "evaluation").glob(f"*/{CONFIG_FILE}")):
        try:
            inner = read_run(path.parent, path.parent.name)
        except ValueError:
            continue
        rows.append([inner.label, ", ".join(status(inner)), f"python -m tools.report {quote(str(inner.path))}"])
    return (
        table("Fine-tuning and distillation", ["run", "status", "its own report"], rows, kind="words") if rows else ""
    )


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description="A run, or several side by side, as one self-contained page."
    )
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out", type=Path, help=f"the page; default: {REPORT} in RUN, or, of several runs, beside the first one"
    )
    parser.add_argument(
        "--test_data",
        help="a .beton or a folder whose images are put on the map; default: an evaluation's, or the training's",
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="leave out views, map and neighbours: nothing is read but the run"
    )
    words = parser.parse_args()
    with clean_termination():
        print(write_report(*words.run, out=words.out, test_data=words.test_data, pictures=not words.no_pictures))


if __name__ == "__main__":
    run(main)
