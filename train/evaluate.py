"""Evaluate what a run learned: `python train/evaluate.py PROTOCOL --checkpoint RUN --train_data A --test_data B`.

`--help` lists the protocols, `PROTOCOL --help` the options of one. It prints one line an amount of labels, and writes
the same, and more, as JSON into the run directory's `evaluation/`, or where `--output_dir` says.
"""

import logging
import os
import sys
from pathlib import Path

if not __package__:  # started as a file: put the project's root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# Read once, when torch is loaded: its threads soon sleep where they wait for one another. Left to spin, they take the
# cores from the very thread that they wait for, as soon as anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Else torch prints stacks of C++ whenever the rank that keeps the store leaves, even at the end of a run.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from train.cli import run
from train.evaluation.command_line import overview, parse_evaluation, summary, wants_overview
from train.evaluation.protocol import evaluate


def main() -> None:
    """Parse, evaluate, print."""
    words = sys.argv[1:]
    if wants_overview(words):
        print(overview())  # noqa: T201
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train.evaluation").setLevel(logging.INFO)
    protocol, config = parse_evaluation(words)
    result, path = evaluate(protocol, config)
    if path is not None:
        print(summary(result, config))  # noqa: T201
        print(f"written to {path}")  # noqa: T201


if __name__ == "__main__":
    run(main)
