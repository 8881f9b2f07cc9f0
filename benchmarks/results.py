"""A session's results as a JSON file: written whole, and read back with every field checked.

The file holds `rows` (what each contestant did), `ratios` (what ours is against each other one, with floor and goal),
`environment`, the exact `command`, the `settings` that it came to, the `images` that were read, and under `figures`
what else a benchmark found of a work. Files written before there were ratios hold rows and environment alone: their
ratios are taken from the medians, without floors and goals.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from benchmarks.harness import Ratio, Row, Unit

FORMAT, FORMAT_VERSION = "twinview-benchmark", 1

Record = TypeVar("Record", Row, Ratio)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that one session of benchmarks found."""

    rows: Sequence[Row]
    ratios: Sequence[Ratio]
    environment: Mapping[str, Any]
    command: str = ""
    """Empty in files that do not tell it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def units(self) -> dict[str, Unit]:
        """By work."""
        return {row.work: row.unit for row in self.rows}


def write_results(path: Path, results: Results) -> None:
    """Write the file under another name first, so that `path` is whole or as it was."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(results)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote, now or formerly.

    Raises:
        ValueError: there is no such file, or it is torn, of something else, or of a newer program.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not {"environment", "rows"} <= content.keys():
        raise ValueError(f"{path}: not a benchmark's result: expected an object with `environment` and `rows`")
    version = content.get("format_version", FORMAT_VERSION)
    if content.get("format", FORMAT) != FORMAT or version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format `{FORMAT}` {FORMAT_VERSION}, got `{content.get('format')}` {version}; "
            "read it with the program that wrote it"
        )
    rows = _records(path, content, "rows", Row)
    for row in rows:
        if row.unit not in get_args(Unit):
            raise ValueError(f"{path}: `unit` must be one of {', '.join(get_args(Unit))}, got {row.unit!r}")
    names = [(row.work, row.contestant) for row in rows]
    if twice := {" of ".join(reversed(name)) for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: a contestant has one row of a work, found more of {', '.join(sorted(twice))}")
    return Results(
        rows=rows,
        ratios=_records(path, content, "ratios", Ratio) if "ratios" in content else ratios_of_medians(rows),
        environment=_section(path, content, "environment", dict),
        command=_section(path, content, "command", str),
        settings=_section(path, content, "settings", dict),
        images=_section(path, content, "images", list),
        figures=_section(path, content, "figures", dict),
    )


def ratios_of_medians(rows: Sequence[Row]) -> list[Ratio]:
    """Of each work's first contestant against the others: all that rows alone can tell."""
    first: dict[str, Row] = {}
    ratios = []
    for row in rows:
        ours = first.setdefault(row.work, row)
        if row is ours:
            continue
        speeds = (ours.median, row.median) if row.unit != "s" else (row.median, ours.median)
        ratios.append(
            Ratio(
                work=row.work,
                first=ours.contestant,
                second=row.contestant,
                ratio=speeds[0] / speeds[1],
                spread=math.hypot(ours.spread, row.spread),
                rounds=min(ours.repeats, row.repeats),
            )
        )
    return ratios


def figure(value: float, unit: str) -> str:
    """Three digits and no exponent, with the unit (a row's, or ×); short times in milliseconds."""
    if unit == "s" and value < 1:
        value, unit = 1000 * value, "ms"
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"
    return f"{digits}{unit}" if unit == "×" else f"{digits} {unit}"


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected one that a benchmark wrote under `--bench-json`")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not whole, or no JSON ({error}); run the benchmark again") from error


def _section(path: Path, content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name, kind())
    if not isinstance(value, kind):
        raise ValueError(f"{path}: `{name}` must be of type {kind.__name__}, got {value!r}")
    return value


def _records(path: Path, content: dict[str, Any], section: str, kind: type[Record]) -> list[Record]:
    """Every entry of a list as a dataclass; fields unknown to it are refused, as a newer program's would be."""
    records = []
    for i, entry in enumerate(_section(path, content, section, list)):
        where = f"{path}: {section}[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {entry!r}")
        fields = {one.name: one for one in dataclasses.fields(kind)}
        lacking = [name for name, one in fields.items() if name not in entry and one.default is dataclasses.MISSING]
        if lacking or entry.keys() - fields.keys():
            named = ", ".join(f"`{name}`" for name in lacking or sorted(entry.keys() - fields.keys()))
            raise ValueError(f"{where} {'lacks' if lacking else 'has the unknown field'} {named}")
        for name, value in entry.items():
            _check(f"{where}.{name}", value, str(fields[name].type))
        records.append(kind(**entry))
    return records


def _check(where: str, value: object, annotation: str) -> None:
    """By the field's annotation: a text, or a finite number, which medians and ratios are positive as well."""
    if value is None and annotation.endswith("None"):
        return
    if annotation in ("str", "Unit"):
        if not isinstance(value, str):
            raise ValueError(f"{where} must be a text, got {value!r}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    if where.endswith((".median", ".ratio")) and value <= 0:
        raise ValueError(f"{where} must be positive, got {value!r}")
