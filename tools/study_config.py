"""What `python -m tools.study` is told: the study's own options, beside those of a pretraining run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from tools.study_catalogue import CATALOGUE
from tools.study_runs import Launcher
from train.cli import parse
from train.config import PretrainConfig, config_from_dict

SWITCHES = {
    "supervised": "`color`: also the paper's row of supervised networks, trained under the same distortions",
    "dry_run": "list the cells and what they cost, and do nothing",
    "table_only": "make table and figure from what is there, and train nothing",
}
"""Options that take no value; fields of `StudyConfig`."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How a study is run."""

    train_data: str
    """The labelled `.beton` that representations are evaluated with."""
    test_data: str
    """The labelled `.beton` that accuracy is measured on."""
    out: str | None = None
    """The study's folder; by default RUNS_DIR/NAME OF THE CONFIGURATION/STUDY."""
    protocol: Literal["default", "linear", "knn", "logistic"] = "default"
    """What a cell is evaluated by; the paper's is `linear`. Other protocols use the same trained cells."""
    evaluation_options: str = ""
    """Further options of that protocol, in one word: `--evaluation_options="--k=200"`."""
    num_seeds: int = 1
    """Runs of each cell: mean, standard deviation and interval are over them. More can be added later."""
    rows: str = ""
    """Values of the rows in place of the study's own, separated by semicolons: `"0.1; 0.5; not normalised, 10"`."""
    columns: str = ""
    """Likewise of the columns."""
    cells: str = ""
    """Only the cells whose names match one of these patterns, separated by semicolons: `"crop--*; *--color"`."""
    supervised: bool = False
    jobs: int = 1
    """Cells at once; they share out the cores."""
    launcher: Launcher = "python"
    """What starts a cell's training."""
    num_ranks: int = 1
    """Ranks of each training, under `deepspeed` or `torchrun`."""
    dry_run: bool = False
    table_only: bool = False

    def __post_init__(self) -> None:
        for name in ("num_seeds", "jobs", "num_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.launcher == "python" and self.num_ranks > 1:
            raise ValueError(f"`num_ranks` must be 1 without a launcher, got {self.num_ranks}; add --launcher torchrun")
        if self.dry_run and self.table_only:
            raise ValueError("`table_only` must be false with `dry_run`, got true")


def words(text: str) -> list[str]:
    """What is listed in one option, separated by semicolons."""
    return [word for word in (part.strip() for part in text.split(";")) if word]


def parse_study(arguments: Sequence[str] | None = None) -> tuple[str, StudyConfig, PretrainConfig]:
    """The study's name, how it is run, and its base configuration.

    Raises:
        ValueError: an unknown study or option, or a value that does not fit; one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="study",
        description="Repeat one of the SimCLR paper's studies on a configuration of your own.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=list(CATALOGUE), help="which")
    parser.add_argument("--config", action="config", help="a YAML file of a pretraining run; later arguments override")
    parser.add_class_arguments(StudyConfig, skip=set(SWITCHES))
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(PretrainConfig)
    parsed = parse(parser, arguments)
    plain = parsed.as_dict()
    base = config_from_dict({name: plain[name] for name in PretrainConfig.__dataclass_fields__})
    how = StudyConfig(**{name: plain[name] for name in StudyConfig.__dataclass_fields__})
    return parsed.study, how, base
