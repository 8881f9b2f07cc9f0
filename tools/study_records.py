"""What a study's folder holds, and which configuration it belongs to.

study.json                                  the study and its base configuration
data.json                                   which sets it began with
cells/CELL/seedK/                           a run directory: checkpoints, metrics.jsonl, …
cells/CELL/seedK.yaml                       its configuration, to be started by hand as well
cells/CELL/seedK.log                        what its processes printed
cells/CELL/seedK.trained.json               there once it is trained
cells/CELL/seedK.PROTOCOL.json              there once it is measured: the cell's record
random.PROTOCOL.json                        the same of random weights
NAME-PROTOCOL.{md,json,csv,png}             table and figure
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.study_grid import Cell, Grid
from tools.whole_file import whole_file
from train.config import PretrainConfig, config_from_dict, flatten, is_adjustable, resolved_dict

STUDY_FILE = "study.json"
DATA_FILE = "data.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A cell with one seed."""

    cell: Cell
    seed: int
    folder: Path
    """Of the cell."""

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.folder / f"seed{self.seed}"

    def file(self, suffix: str) -> Path:
        """A file beside the run directory."""
        return self.folder / f"seed{self.seed}.{suffix}"


def trials_of(grid: Grid, num_seeds: int, out: Path) -> list[Trial]:
    """Every cell with every seed: all cells with the first one come first."""
    return [
        Trial(cell=cell, seed=seed, folder=out / "cells" / cell.name)
        for seed in range(num_seeds)
        for cell in grid.cells
    ]


def keep(trial: Trial, suffix: str, value: Mapping[str, Any]) -> None:
    """Write what is known of a trial, with what its cell changes."""
    write_json(trial.file(suffix), dict(value) | {"overrides": _plain_overrides(trial)})


def kept(trial: Trial, suffix: str) -> dict[str, Any] | None:
    """What `keep` wrote, or None.

    Raises:
        ValueError: the cell changed something else then: the base has other values of what the study varies.
    """
    value, ours = read_json(trial.file(suffix)), _plain_overrides(trial)
    if value is None:
        return None
    theirs = value.get("overrides", {})
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"`{key}` is {theirs.get(key)} in {trial.file(suffix)} and {ours.get(key)} in this study; choose "
                "another `out`"
            )
    return value


def _plain_overrides(trial: Trial) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(trial.cell.overrides)))
    return plain


def write_json(path: Path, value: object) -> None:
    """Write a file that is whole as soon as it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.partial").unlink(missing_ok=True)  # of a process that was killed: the study is locked
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged; remove it, and what it told is made anew")
    return value


def claim_study_dir(out: Path, name: str, base: PretrainConfig, data: Mapping[str, str], varies: Sequence[str]) -> None:
    """Write what the folder belongs to, or check that it is this study.

    Args:
        out: the folder; made if it is missing.
        name: of the study.
        base: its base configuration. Fields that only say where and how a run goes on may differ, as for a run.
        data: what cells are evaluated on, by the name of the option.
        varies: fields that cells set themselves: what the base says of them has no effect.

    Raises:
        ValueError: it belongs to another configuration; the first field that differs.
    """
    path = out / STUDY_FILE
    about = {"study": name, "format": FORMAT_VERSION, **data}
    stored = read_json(path)
    if stored is None:
        write_json(path, about | {"config": resolved_dict(base)})
        return
    try:  # an option that is newer than the study had its default's effect there
        config = resolved_dict(config_from_dict(stored.pop("config", {})))
    except ValueError as error:
        raise ValueError(f"{path} was written by another version ({error}); choose another `out`") from error
    ours, theirs = about | flatten(resolved_dict(base)), stored | flatten(config)
    for key in sorted(ours.keys() | theirs.keys()):
        if key == "name" or is_adjustable(key) or key in varies or ours.get(key) == theirs.get(key):
            continue
        raise ValueError(
            f"`{key}` is {theirs.get(key)} in {path} and {ours.get(key)} in this study; choose another `out`, "
            f"or remove {out} to start over"
        )


def claim_data(out: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write which sets a study uses, or check that they are still the same: a file may have become another one.

    Args:
        out: the study's folder.
        sets: by the name of the option, what tells each set apart from others; JSON values.

    Raises:
        ValueError: one is another set now.
    """
    path = out / DATA_FILE
    stored = read_json(path)
    if stored is None:
        write_json(path, sets)
        return
    for name, ours in sets.items():
        if stored.get(name) != ours:
            raise ValueError(
                f"`{name}` is not the set that this study began with ({path}); give that one, choose another `out`, or "
                f"remove {out} to start over"
            )


def measured_so(trial: Trial, protocol: str, options: Sequence[str]) -> dict[str, Any] | None:
    """The record of a trial under a protocol and its options, or None; what has no protocol has no options."""
    record = kept(trial, f"{protocol}.json")
    if record is None or trial.cell.measure != "protocol":
        return record
    return record if record.get("evaluation_options", []) == list(options) else None


def random_so(path: Path, options: Sequence[str]) -> dict[str, Any] | None:
    """Likewise the record of random weights."""
    record = read_json(path)
    return record if record is None or record.get("evaluation_options", []) == list(options) else None


def records_of(
    grid: Grid, num_seeds: int, out: Path, protocol: str, options: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """What is measured so far: for each cell's name the records of its seeds, in their order."""
    records: dict[str, list[dict[str, Any]]] = {}
    for trial in trials_of(grid, num_seeds, out):
        record = measured_so(trial, protocol, options)
        if record is not None:
            records.setdefault(trial.cell.name, []).append(record)
    return records
