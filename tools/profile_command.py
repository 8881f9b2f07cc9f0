"""The command line of `tools.profile_throughput`: measure, judge, try, tell."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.build import open_data
from tools.profile_advice import diagnose
from tools.profile_communication import communication_named
from tools.profile_figure import check_figure_path, write_figure
from tools.profile_rig import only_steps
from tools.profile_stages import ProfileSettings, measure_profile
from tools.profile_surroundings import survey
from tools.profile_sweep import best_of, sweep
from tools.profile_table import diagnosis_text, sweep_text, verified_text
from tools.profile_trace import write_trace
from tools.profile_verify import Verified, verify
from tools.whole_file import clean_termination, whole_file
from train.cli import UnfitEnvironment
from train.config import PretrainConfig, parse_pretrain_config
from train.runtime import Ranks, choose_device, read_ranks

MAX_SECONDS = 3600.0
SWEEP_TURNS = 60  # times `--seconds`: as long a sweep may take before it begins no other combination
NAME = "--name=profile"  # of a run that never is: a configuration must have one


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for, beside the run."""

    seconds: float
    json: Path | None
    figure: Path | None
    trace: Path | None
    sweep: bool
    verify: bool

    def __post_init__(self) -> None:
        if not 0.0 < self.seconds <= MAX_SECONDS:
            raise ValueError(f"`--seconds` must be above 0 and at most {MAX_SECONDS:g}, got {self.seconds}")
        if self.figure is not None:
            check_figure_path(self.figure)
        given = {name: getattr(self, name) for name in ("json", "figure", "trace")}
        for name, path in given.items():
            if path is None:
                continue
            if path.is_dir():
                raise ValueError(f"`--{name}` must name a file, got the folder {path}")
            if not path.parent.is_dir():
                raise ValueError(f"`--{name}` must lie in a folder that exists, got {path}; make {path.parent}")
        paths = [path.resolve() for path in given.values() if path is not None]
        if len(set(paths)) < len(paths):
            raise ValueError("`--json`, `--figure` and `--trace` must name different files")


def parse_arguments(arguments: Sequence[str]) -> tuple[Asked, PretrainConfig]:
    """Ours, and the run's: what is not one of ours goes to `train/pretrain.py`'s parser.

    Raises:
        ValueError: an unknown option, or a value that does not fit; one line.
    """
    parser = _parser()
    try:
        ours, rest = parser.parse_known_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if ours.help:
        print(parser.format_help())
        print("Options of the run, as train/pretrain.py takes them:\n")
        parse_pretrain_config(["--help"])  # prints, and exits
    asked = Asked(
        seconds=ours.seconds,
        json=ours.json,
        figure=ours.figure,
        trace=ours.trace,
        sweep=ours.sweep,
        verify=not ours.no_verify,
    )
    data = [] if ours.data is None else ["--data.path", ours.data]
    return asked, parse_pretrain_config([NAME, *rest, *data])


def profile_throughput(asked: Asked, config: PretrainConfig) -> None:
    """Measure, judge, try, tell. All ranks must call; rank 0 prints and writes.

    Raises:
        ValueError, OSError, UnfitEnvironment, RunFailed: a file that is not written yet does not appear then.
    """
    ranks, steps = read_ranks(), only_steps(config)
    _say(ranks, f"measuring each stage, {asked.seconds:g} s each")
    try:
        profile = measure_profile(config, ProfileSettings(seconds=asked.seconds))
    except torch.OutOfMemoryError as error:
        raise UnfitEnvironment(
            f"a step of {config.data.global_batch_size // ranks.world_size} images does not fit into the GPU's memory; "
            "lower `data.global_batch_size`, or set `train.micro_batch_size`"
        ) from error
    around = survey(open_data(steps.data), choose_device(steps.train.device, ranks))
    diagnosis = diagnose(profile, around)
    _tell(ranks, diagnosis_text(diagnosis))
    found: dict[str, Any] = diagnosis.to_json()

    verified = Verified(wanted=False)
    if asked.verify:
        _say(ranks, "trying the advice")
        verified = verify(diagnosis, around, steps, ranks, seconds=asked.seconds)
        _tell(ranks, "\n" + verified_text(verified))
    found["verified"] = verified.to_json()

    if asked.sweep:
        _say(ranks, "sweeping")
        cells = sweep(steps, ranks, seconds=asked.seconds, total_seconds=SWEEP_TURNS * asked.seconds)
        _tell(ranks, "\n" + sweep_text(cells))
        best = best_of(cells)
        found["sweep"] = {"cells": [cell.to_json() for cell in cells], "best": best and best.to_json()}

    if ranks.rank == 0:
        if asked.figure is not None:
            write_figure(diagnosis, asked.figure)
        if asked.json is not None:
            write_json(found, asked.json)
    if asked.trace is not None:
        _say(ranks, "recording steps")
        write_trace(steps, ranks, asked.trace)


def write_json(found: dict[str, Any], path: Path) -> None:
    """Into a file that appears when it is whole.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as file:
        file.write(f"{text}\n".encode())


def main() -> None:
    """The command line."""
    asked, config = parse_arguments(sys.argv[1:])
    with clean_termination(), communication_named():  # which the trace shows too
        profile_throughput(asked, config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_throughput",
        description="Measure each stage of a run on this machine: which one limits, and what to change.",
        epilog="Every option of train/pretrain.py may follow; they are listed below.",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and the options of a run")
    parser.add_argument("--data", metavar="PATH", help="short for --data.path")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was found")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="write the stages as a picture, *.png or *.svg")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a few steps as a Chrome trace, *.json")
    parser.add_argument("--sweep", action="store_true", help="also measure loader × batch × decoding threads")
    parser.add_argument(
        "--seconds", type=float, default=ProfileSettings.seconds, help="of each measurement (default: %(default)g)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not try the advice")
    return parser


def _say(ranks: Ranks, words: str) -> None:
    """What it is at, beside the result."""
    if ranks.rank == 0:
        print(f"{words} …", file=sys.stderr)


def _tell(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)
