"""What every command-line entry point does around its work: one clear line for the user instead of a traceback.

Exit codes: 0 done; 1 the run itself failed; 2 bad input, or an environment that cannot do what was asked; 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

TRACEBACK_VARIABLE = "TWINVIEW_TRACEBACK"
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class UnfitEnvironment(RuntimeError):
    """This machine cannot do what was asked: a device, a package or a permission is missing."""


class RunFailed(RuntimeError):
    """The run began and cannot go on, for a reason that one line can tell."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code, or with one line on stderr and the code of what went wrong.

    `ValueError`, `OSError` and `UnfitEnvironment` are the user's to mend (code 2), `RunFailed` is the run's (code 1);
    anything else is a bug and keeps its traceback. Set TWINVIEW_TRACEBACK=1 to see every traceback.
    """
    try:
        code = main() or 0
    except (ValueError, OSError, UnfitEnvironment, RunFailed) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _complain(error)
        code = EXIT_FAILED if isinstance(error, RunFailed) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Namespace:
    """Parse with jsonargparse, its complaints turned into one line that names field, expected and found.

    Raises:
        ValueError: an unknown key, a value of the wrong kind, a missing one, or no such file.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(_clarify(parser, " ".join(str(error).split()))) from error


def _clarify(parser: ArgumentParser, message: str) -> str:
    if match := re.fullmatch(r'Parser key "(.+?)": Expected a (.+)\. Got value: (.*)', message):
        key, kind, found = match.groups()
        if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            return f"`{key}` must be one of {choices[1]}, got {found}"
        kind = re.sub(r"<class '(.*)'>", r"\1", kind)
        return f"`{key}` must be of type {kind}, got {found}"
    if match := re.fullmatch(r"unrecognized arguments: (?:--)?([^ =]+).*", message):
        return _unknown(parser, match[1])
    if match := re.fullmatch(r"Group '(.*)' does not accept option '(.*)'", message):
        return _unknown(parser, f"{match[1]}.{match[2]}")
    return message


def _unknown(parser: ArgumentParser, key: str) -> str:
    known = list(parser.get_defaults(skip_validation=True).keys())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"there is no option `{key}`; {hint}`--help` lists them all"


def _complain(error: Exception) -> None:
    """Print the line, once for all ranks while they still check the same input, and by name once they differ."""
    rank = os.environ.get("RANK", "0")
    line = " ".join(str(error).split())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        print(f"error: rank {rank}: {line}", file=sys.stderr)  # noqa: T201
    elif rank == "0":
        print(f"error: {line}", file=sys.stderr)  # noqa: T201
