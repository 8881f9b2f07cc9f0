"""Pictures of what a run learned, and the numbers behind them: `python -m tools.pictures NAME --checkpoint RUN …`.

    python -m tools.pictures embedding  --checkpoint runs/a --test_data data/test.beton
    python -m tools.pictures neighbours --checkpoint runs/a --test_data data/test.beton
    python -m tools.pictures confusion  --checkpoint runs/a --test_data data/test.beton --train_data data/train.beton
    python -m tools.pictures spectrum   --checkpoint runs/a --test_data data/test.beton
    python -m tools.pictures curves     --runs runs/a runs/b runs/c

Each writes a PNG and a JSON of the same name into `pictures/` of the run, or where `--out` says; the same options give
the same bytes. docs/guides/pictures.md says what each shows.

Exit codes: 0 written; 2 bad input, and then nothing was written.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: its threads soon sleep where they wait for one another (see train/evaluate.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import matplotlib as mpl
from jsonargparse import ArgumentParser, set_parsing_settings

from tools.pictures_canvas import STYLE, Drawn, write_picture
from tools.whole_file import clean_termination
from train.cli import parse, run

LISTS = ("--runs", "--metrics", "--classes")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One subcommand."""

    help: str
    config_name: str
    """Of the dataclass in the picture's module, `tools.pictures_NAME`, beside its function `draw`."""

    def module(self, name: str) -> Any:
        """Imported when it is asked for."""
        return importlib.import_module(f"tools.pictures_{name}")


PICTURES = {
    "embedding": Picture(
        help="h and z in the plane, by t-SNE or PCA, coloured by class", config_name="EmbeddingConfig"
    ),
    "neighbours": Picture(
        help="images and those nearest to them, right and wrong ones", config_name="NeighboursConfig"
    ),
    "confusion": Picture(help="which classes are taken for which", config_name="ConfusionConfig"),
    "spectrum": Picture(help="eigenvalues of the projection head, of h and of z", config_name="SpectrumConfig"),
    "curves": Picture(help="training curves of several runs, with bands over seeds", config_name="CurvesConfig"),
}


def parse_picture(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Read the command line.

    Returns:
        The picture's name and its configuration.

    Raises:
        ValueError: an unknown option, or a value outside its choices; one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m tools.pictures",
        description="Pictures of what a run learned, and the numbers behind them.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="picture")
    classes = {}
    for name, picture in PICTURES.items():
        classes[name] = getattr(picture.module(name), picture.config_name)
        command = ArgumentParser(description=picture.help, exit_on_error=False, allow_abbrev=False)
        command.add_class_arguments(classes[name])
        commands.add_subcommand(name, command, help=picture.help)
    words = _lists(list(sys.argv[1:] if arguments is None else arguments))
    values = parser.instantiate(parsed := parse(parser, words))[parsed.picture]
    config_class = classes[parsed.picture]
    return parsed.picture, config_class(**{name: values[name] for name in config_class.__dataclass_fields__})


def write(name: str, config: Any) -> Path:
    """Draw a picture and write it and its numbers.

    Returns:
        The PNG.

    Raises:
        ValueError, OSError: what is asked for cannot be shown; nothing was written.
    """
    with mpl.rc_context(STYLE):
        drawn: Drawn = PICTURES[name].module(name).draw(config)
        return write_picture(drawn)


def _lists(words: list[str]) -> list[str]:
    """Lists given word by word (`--runs a b c`) as one word (`--runs=["a","b","c"]`), which the parser takes."""
    out: list[str] = []
    rest = words
    while rest:
        option, rest = rest[0], rest[1:]
        given = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        if option in LISTS and given and not given[0].startswith("["):
            option, rest = f"{option}={json.dumps(given)}", rest[len(given) :]
        out.append(option)
    return out


def main() -> None:
    """Parse, draw, write."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    name, config = parse_picture()
    with clean_termination():
        print(write(name, config))


if __name__ == "__main__":
    run(main)
