"""What every command-line entry point does around its work: one clear line for the user instead of a traceback.

Exit codes: 0 done; 1 the run itself failed; 2 bad input, or an environment that cannot do what was asked; 75 (the
EX_TEMPFAIL of BSD's sysexits.h) stopped before its end through no fault of its own, and the same command goes on; 130
Ctrl-C.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

TRACEBACK_VARIABLE = "TWINVIEW_TRACEBACK"
UNKNOWN_OPTION = (  # as argparse and jsonargparse put it
    r"unrecognized arguments: (?:--)?([^ =]+)",
    r"Group '(.*)' does not accept option '(.*)'",
    r"Option '(.*)' is not accepted",
)
HEAD_START_S = 1.0  # for rank 0, before the launcher sees another rank end and ends it too
PATIENCE_S = 10.0  # ranks of one machine start within a few seconds of one another
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_RESUMABLE, EXIT_INTERRUPTED = 1, 2, 75, 130


class UnfitEnvironment(RuntimeError):
    """This machine cannot do what was asked: a device, a package or a permission is missing."""


class RunStopped(RuntimeError):
    """The run began and does not go on, for a reason that one line can tell.

    Args:
        message: the line.
        alike: every rank raises the same words; rank 0 alone prints them.
    """

    def __init__(self, message: str, *, alike: bool = False) -> None:
        super().__init__(message)
        self.alike = alike


class RunFailed(RunStopped):
    """It would fail again."""


class RunInterrupted(RunStopped):
    """It was stopped from outside: the same command goes on from the last checkpoint.

    Args:
        message: the line.
        alike: see `RunStopped`.
        code: to exit with.
    """

    def __init__(self, message: str, *, alike: bool = False, code: int = EXIT_RESUMABLE) -> None:
        super().__init__(message, alike=alike)
        self.code = code


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code, or with one line on stderr and the code of what went wrong.

    `ValueError`, `OSError` and `UnfitEnvironment` are the user's to mend (code 2), `RunFailed` is the run's (code 1),
    `RunInterrupted` nobody's (code 75); anything else is a bug and keeps its traceback. Set TWINVIEW_TRACEBACK=1 to
    see every traceback.
    """
    try:
        code = main() or 0
    except (ValueError, OSError, UnfitEnvironment, RunStopped) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _complain(error)
        code = _exit_code(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)


def _exit_code(error: Exception) -> int:
    if isinstance(error, RunInterrupted):
        return error.code
    return EXIT_FAILED if isinstance(error, RunFailed) else EXIT_BAD_INPUT


def parse(parser: ArgumentParser, arguments: Sequence[str] | dict[str, Any] | None = None) -> Namespace:
    """Parse words of a command line (by default the process's), or nested values, with jsonargparse.

    Raises:
        ValueError: an unknown key, a value of the wrong kind, a missing one, or no such file; one line that names
            field, expected and found.
    """
    try:
        parsed: Namespace = (
            parser.parse_object(arguments) if isinstance(arguments, dict) else parser.parse_args(arguments)
        )
        return parsed
    except UnicodeDecodeError as error:
        raise ValueError("`--config` must name a YAML file, got one that is no text") from error
    except ArgumentError as error:
        raise ValueError(_clarify(parser, " ".join(str(error).split()))) from error


def _clarify(parser: ArgumentParser, message: str) -> str:
    """One line in our words, where jsonargparse's or argparse's complaint is of a known form."""
    if match := re.search(r'Parser key "([^"]+)": Does not validate.*?Subtypes: \[(.*)\] Errors.*value: (.*)', message):
        return _unfit_optional(*match.groups())
    if match := re.search(r'Parser key "([^"]+)": Expected a (.+?)\. Got value: (.*)', message):
        key, kind, found = match.groups()
        if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            return f"`{key}` must be one of {choices[1]}, got {found}"
        return f"`{key}` must be {_kind(kind)}, got {found}"
    for form in UNKNOWN_OPTION:
        if match := re.search(form, message):
            return _unknown(parser, ".".join(match.groups()))
    if match := re.fullmatch(r"Unexpected config:\s*(.*)", message):
        return f"`--config` must name a YAML file of sections and options, got {match[1] or 'an empty one'}"
    return message


def _unfit_optional(key: str, kinds: str, found: str) -> str:
    return f"`{key}` must be {_kind(kinds)}, or null, got {found}"


def _kind(annotation: str) -> str:
    if match := re.search(r"tuple\[((?:float|int)(?:, (?:float|int))*)\]", annotation):
        return f"a list of {match[1].count(',') + 1} numbers"
    if "tuple" in annotation:
        return "a list such as [1, 2]"
    plain = re.search(r"<class '(\w+)'>", annotation)
    return f"of type {plain[1] if plain else annotation}"


def _unknown(parser: ArgumentParser, key: str) -> str:
    known = list(parser.get_defaults(skip_validation=True).keys())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"there is no option `{key}`; {hint}`--help` lists them all"


def _complain(error: Exception) -> None:
    """Print the line: by name once ranks may differ; before, once a machine, since all of them check the same input.

    The launcher ends all ranks as soon as one exits. So the others give the first one time to speak; whoever still
    runs after that has met a fault of its own.
    """
    rank = os.environ.get("RANK", "0")
    line = _printable(" ".join(str(error).split()))
    alike = isinstance(error, RunStopped) and error.alike
    if alike and rank != "0":
        time.sleep(HEAD_START_S)
        return
    differ = not alike and dist.is_initialized() and dist.get_world_size() > 1
    if not differ and not alike and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_S)
        differ = True
    print(f"error: rank {rank}: {line}" if differ else f"error: {line}", file=sys.stderr)  # noqa: T201


def _printable(text: str) -> str:
    """With escapes for what moves a terminal's cursor, as names in files that others made may."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
