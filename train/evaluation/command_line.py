"""From the words of `train/evaluate.py` to a protocol and its configuration, and from a result to the lines it prints.

The first word names the protocol, but for the `--local_rank` that DeepSpeed's launcher puts before it. Each protocol
has a parser of its own, so that its module is imported and no other one's.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from jsonargparse import ArgumentParser, set_parsing_settings

from train.cli import parse
from train.evaluation.classification import LEVEL
from train.evaluation.protocol import PROTOCOLS, EvaluationConfig, Protocol
from train.evaluation.results import Result, labels_in_words, record_of_figures

PROG = "evaluate.py"
LAUNCHER_OPTION = "--local_rank"


class Asked(NamedTuple):
    """What a command line asks for."""

    protocol: Protocol
    config: EvaluationConfig


def parse_evaluation(words: Sequence[str]) -> Asked:
    """The protocol that is asked for, and what it is told. Prints help, and ends the process, where that is asked for.

    Raises:
        ValueError: no such protocol; an unknown option or value, or a missing one; one line.
    """
    protocol, options = _split(words)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"{PROG} {protocol.name}", description=protocol.help, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file; later arguments override it")
    parser.add_argument(LAUNCHER_OPTION, type=int, default=-1, help="set by the deepspeed launcher; not used")
    config_class = protocol.config_class
    parser.add_class_arguments(config_class)
    values = parser.instantiate(parse(parser, options))
    return Asked(protocol, config_class(**{name: values[name] for name in config_class.__dataclass_fields__}))


def wants_overview(words: Sequence[str]) -> bool:
    """Whether help is asked for, and no protocol named."""
    return not words or words[0] in ("-h", "--help")


def overview() -> str:
    """What there is, as `--help` prints it."""
    width = max(map(len, PROTOCOLS))
    lines = [f"  {protocol.name:{width}}  {protocol.help}" for protocol in PROTOCOLS.values()]
    return "\n".join(
        [
            f"usage: {PROG} PROTOCOL --checkpoint RUN --train_data A --test_data B [options]",
            "\nEvaluate what a run learned.\n",
            "protocols:",
            *lines,
            f"\n`{PROG} PROTOCOL --help` lists the options of one.",
        ]
    )


def summary(result: Result, config: EvaluationConfig) -> str:
    """A line for each amount of labels, and one for what was chosen."""
    lines = []
    for labels, figures in record_of_figures(result).items():
        top1 = figures["top1"]
        spread = f" ± {100 * top1['std']:.1f}" if figures["num_seeds"] > 1 else ""
        low, high = top1["confidence_interval"]
        lines.append(
            f"{result.protocol}, {config.representation}, {labels_in_words(labels)}: top-1 {100 * top1['mean']:.1f} %"
            f"{spread} ({LEVEL:.0%} interval {100 * low:.1f} to {100 * high:.1f}), "
            f"top-5 {100 * figures['top5']['mean']:.1f} %, "
            f"mean per class {100 * figures['mean_per_class']['mean']:.1f} %"
        )
    if result.chosen:
        settings = ", ".join(f"{name} {value}" for name, value in result.chosen.items())
        lines.append(f"chosen: {settings}; {result.chosen_by}")
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[Protocol, list[str]]:
    """The protocol, and the words for its parser."""
    first = 0
    while first < len(words) and words[first].split("=")[0] == LAUNCHER_OPTION:
        first += 1 if "=" in words[first] else 2
    name = words[first] if first < len(words) else None
    if name in PROTOCOLS:
        return PROTOCOLS[name], [*words[:first], *words[first + 1 :]]
    near = difflib.get_close_matches(name or "", PROTOCOLS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; `{PROG} --help` explains them"
    raise ValueError(f"the first argument must be one of {', '.join(PROTOCOLS)}, got {name or 'none'}{hint}")
