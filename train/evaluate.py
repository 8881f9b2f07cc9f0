"""Evaluate what a run learned: `python train/evaluate.py knn|linear --checkpoint RUN --train_data A --test_data B`.

Each subcommand is a protocol on frozen representations. It prints one line an amount of labels, and writes the same
as JSON into the run directory's `evaluation/`, or where `--output_dir` says.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started as a file: put the project's root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# Read once, when torch is loaded: its threads soon sleep where they wait for one another. Left to spin, they take the
# cores from the very thread that they wait for, as soon as anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from jsonargparse import ArgumentParser, set_parsing_settings

from train.cli import parse, run
from train.evaluation.run import EvaluateConfig, evaluate, output_path

PROTOCOLS = {
    "knn": "weighted k-nearest neighbours, cosine similarity",
    "linear": "multinomial logistic regression on standardised features",
}


def main() -> None:
    """Parse, evaluate, print."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="evaluate.py", description="Evaluate a learned encoder.", exit_on_error=False, allow_abbrev=False
    )
    commands = parser.add_subcommands(dest="protocol")
    for name, help_text in PROTOCOLS.items():
        command = ArgumentParser(description=help_text, exit_on_error=False, allow_abbrev=False)
        command.add_class_arguments(EvaluateConfig)
        commands.add_subcommand(name, command, help=help_text)
    parsed = parse(parser)
    values = parser.instantiate(parsed)[parsed.protocol]
    config = EvaluateConfig(**{name: values[name] for name in EvaluateConfig.__dataclass_fields__})
    for labels, figure in evaluate([parsed.protocol], config)[parsed.protocol].items():
        percent = f"{100 * figure['mean']:5.1f} % ± {100 * figure['std']:.1f}"
        print(f"{parsed.protocol}, {config.representation}, {labels:>4} labels a class: {percent}")  # noqa: T201
    print(f"written to {output_path(parsed.protocol, config)}")  # noqa: T201


if __name__ == "__main__":
    run(main)
