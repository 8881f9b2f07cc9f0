"""The ablations of the SimCLR paper, one command each: `python -m tools.study NAME --config BASE.yaml …`.

Every cell of the study's table is a pretraining run of the base configuration with some fields changed, and an
evaluation. A study goes on where it stopped by the same command; it ends with one table (Markdown, JSON, CSV) and one
figure (PNG), with the paper's numbers beside the measured ones and what was scaled down. The studies are in
`tools.study_catalogue`, the folder of a study is explained in `tools.study_records`.
"""

from __future__ import annotations

import shlex
import signal
import statistics
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.build import Subset, open_data
from tools.study_catalogue import CATALOGUE
from tools.study_cells import supervised_cells
from tools.study_config import StudyConfig, parse_study, words
from tools.study_figure import draw
from tools.study_grid import Cell, Grid, build_grid, configure
from tools.study_records import (
    Trial,
    claim_data,
    claim_study_dir,
    kept,
    measured_so,
    random_so,
    records_of,
    trials_of,
    write_json,
)
from tools.study_results import collect, to_csv
from tools.study_runs import Children, HowToRun, run_random, run_trials
from tools.study_scale import num_parameters, scaled_down
from tools.study_table import to_markdown
from tools.whole_file import whole_file
from train.cli import EXIT_INTERRUPTED, EXIT_RESUMABLE, RunInterrupted, run
from train.config import PretrainConfig
from train.evaluation.checks import check_splits
from train.evaluation.labelled_data import LabelledData, identity_of, open_labelled
from train.run_lock import locked_run_dir
from train.runtime import package_versions


def main() -> None:
    """Parse, train and evaluate what is missing, write table and figure."""
    name, config, base = parse_study()
    study(name, config, base, sys.argv[1:])


def study(
    name: str, config: StudyConfig, base: PretrainConfig, arguments: list[str], children: Children | None = None
) -> None:
    """Run a study, or what is missing of it.

    Args:
        name: of the study.
        config: how it is run.
        base: its base configuration.
        arguments: of the command, to be shown with the table.
        children: start its processes.

    Raises:
        ValueError: the input does not fit, or the folder belongs to another study.
        RunFailed: some cells failed; the others are done.
        RunInterrupted: told to stop; the same command goes on.
    """
    grid = build_grid(
        CATALOGUE[name],
        base,
        rows=words(config.rows),
        columns=words(config.columns),
        patterns=words(config.cells),
        extra=_supervised(name, config),
    )
    protocol = _protocol(grid, config)
    out = Path(config.out) if config.out else Path(base.runs_dir) / base.name / name
    how = HowToRun(
        base=base,
        protocol=protocol,
        train_data=config.train_data,
        test_data=config.test_data,
        evaluation_options=tuple(shlex.split(config.evaluation_options)),
        launcher=config.launcher,
        num_ranks=config.num_ranks,
        jobs=config.jobs,
    )
    trials = trials_of(grid, config.num_seeds, out)
    if config.dry_run:
        _list_cells(grid, trials, how)
        return
    train, test = open_labelled(config.train_data, "train"), open_labelled(config.test_data, "test")
    check_splits(train, test)
    data = {"train_data": config.train_data, "test_data": config.test_data}
    options = how.evaluation_options
    if config.table_only and not records_of(grid, config.num_seeds, out, protocol, options):
        raise ValueError(f"`table_only` needs cells that are measured by {protocol}, there are none in {out}")
    out.mkdir(parents=True, exist_ok=True)
    random_record = out / f"random.{protocol}.json"
    with locked_run_dir(out):
        claim_study_dir(out, name, base, data, grid.study.varies)
        claim_data(out, {"data.path": _pretrained_on(base), "train_data": train.identity, "test_data": test.identity})
        try:
            if not config.table_only:
                with _signals():
                    children = children or Children()
                    run_trials(trials, how, children, print)
                    run_random(trials[0], how, random_record, children)
        finally:
            records = records_of(grid, config.num_seeds, out, protocol, options)
            if records:
                result = collect(grid, records, random_so(random_record, options), len(test.labels))
                result |= _about(grid, config, how, test, arguments)
                _write(result, out / f"{name}-{protocol}")


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask to stop into `RunInterrupted`, once."""

    def stop(number: int, _: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
        raise RunInterrupted("stopped; the same command goes on with the study", code=code)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _protocol(grid: Grid, config: StudyConfig) -> str:
    """What cells are evaluated by."""
    own = grid.study.protocol
    if config.protocol == "default":
        return own
    if own == "transformation":
        raise ValueError(f"`protocol` must be left out for {grid.study.name}, which has its own, got {config.protocol}")
    return config.protocol


def _supervised(name: str, config: StudyConfig) -> list[Cell]:
    """The supervised row, where it is asked for."""
    if not config.supervised:
        return []
    if name != "color":
        raise ValueError(f"`supervised` belongs to the study color, got {name}")
    return supervised_cells(words(config.columns), _num_classes(open_labelled(config.test_data, "test")))


def _pretrained_on(base: PretrainConfig) -> dict[str, Any]:
    """What tells the set of the pretraining apart from others, and from other parts of itself."""
    data = open_data(base.data)
    identity = dict(identity_of(base.data.path, "train") or {})
    return identity | ({"rows_crc32": zlib.crc32(data.rows.tobytes())} if isinstance(data, Subset) else {})


def _num_classes(data: LabelledData) -> int:
    return len(data.classes) if data.classes else int(data.labels.max()) + 1


def _about(grid: Grid, config: StudyConfig, how: HowToRun, test: LabelledData, arguments: list[str]) -> dict[str, Any]:
    """What is said of a study beside its numbers."""
    return {
        "protocol": how.protocol,
        "num_seeds": config.num_seeds,
        "guess": f"{100 / _num_classes(test):.1f}",
        "scaled_down": scaled_down(
            grid.study,
            how.base,
            num_images=open_data(how.base.data).num_samples,
            num_test=len(test.labels),
            num_classes=_num_classes(test),
            protocol=how.protocol,
        ),
        "command": shlex.join(["python", "-m", "tools.study", *arguments]),
        "versions": package_versions(),
    }


def _write(result: dict[str, Any], stem: Path) -> None:
    """Table and figure."""
    write_json(stem.with_name(f"{stem.name}.json"), result)
    text = to_markdown(result)
    for suffix, content in (("csv", to_csv(result)), ("md", text)):
        path = stem.with_name(f"{stem.name}.{suffix}")
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        with whole_file(path) as file:
            file.write(content.encode())
    draw(result, stem.with_name(f"{stem.name}.png"))
    print(f"\n{text}\ntable and figure: {stem}.md, .json, .csv and .png")


def _list_cells(grid: Grid, trials: list[Trial], how: HowToRun) -> None:
    """Each cell with what it takes; where some are measured, the time of the others by the images they see."""
    rates, left = [], 0
    for trial in trials:
        config = configure(how.base, trial.cell, seed=trial.seed, runs_dir=str(trial.folder))
        images = open_data(config.data).num_samples
        steps = images // config.data.global_batch_size * config.train.epochs
        seen = steps * config.data.global_batch_size
        record = measured_so(trial, how.protocol, how.evaluation_options)
        state = "measured" if record is not None else "trained" if kept(trial, "trained.json") is not None else "to do"
        if record is not None:
            rates.append(sum(record["seconds"].values()) / seen)
        elif state == "to do":
            left += seen
        print(
            f"{trial.name}: {steps:,} steps of {config.data.global_batch_size} images, {seen:,} in all; encoder of "
            f"{num_parameters(config) / 1e6:.3g} million parameters; {state}"
        )
    print(f"{len(trials)} runs of {len(grid.cells)} cells; {left:,} images to train on in those not yet trained")
    if rates and left:
        seconds = left * statistics.fmean(rates) / how.jobs
        print(f"about {seconds / 60:.0f} minutes at the pace of the {len(rates)} measured, {how.jobs} at once")


if __name__ == "__main__":
    run(main)
