"""How a run was set up, where it ran, and the command that runs it again."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from typing import Any

from pipelines.build import DataConfig
from tools.report_page import code, details, missing, paragraph, table
from tools.report_runs import RunRecord
from train.config import CONFIG_FILE, PretrainConfig, flatten, resolved_dict

AGAIN = "-again"
NO_DEFAULT = "–"


def configuration(run: RunRecord) -> str:
    """What differs from the defaults, then everything."""
    path = run.path / CONFIG_FILE
    whole = details(f"Every option ({CONFIG_FILE})", code(path.read_text(encoding="utf-8", errors="replace")))
    if run.config is None:
        return missing("Defaults of another version of Twinview are not known here.") + whole
    rows = [[key, shown(value), shown(default)] for key, value, default in changed_options(run.config)]
    return table("Options that differ from their defaults", ["option", "value", "default"], rows, kind="words") + whole


def changed_options(config: PretrainConfig) -> list[tuple[str, Any, Any]]:
    """Options with another value than their default, in their order: name, value, default."""
    ours = flatten(resolved_dict(config))
    default = _defaults(config)
    return [(key, value, default.get(key)) for key, value in ours.items() if value != default.get(key)]


def _defaults(config: PretrainConfig) -> dict[str, Any]:
    """Those of every option; name and path, which have none, count as ones that differ."""
    plain = PretrainConfig(name=config.name, data=DataConfig(path=config.data.path))
    return flatten(resolved_dict(plain)) | {"name": NO_DEFAULT, "data.path": NO_DEFAULT}


def shown(value: Any) -> str:
    """A value as a configuration file has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def environment(run: RunRecord) -> str:
    """Where it ran, and with which versions."""
    rows = []
    if run.starts:
        last = run.starts[-1]
        rows += [
            [title, str(last[key])]
            for key, title in (
                ("host", "machine"),
                ("device_name", "device"),
                ("device", "kind of device"),
                ("num_cores", "CPU cores"),
                ("commit", "commit of Twinview"),
            )
            if last.get(key) not in (None, "")
        ]
    if run.world_size:
        rows.append(["ranks", str(run.world_size)])
    rows += [[str(name), str(version)] for name, version in run.sections.get("versions", {}).items()]
    if not rows:
        return missing("Versions are in the checkpoints, and there is none that can be read yet.")
    return table("What it ran on, and with", ["what", "found"], rows, kind="words")


def again(run: RunRecord) -> str:
    """The command that trains it again, and those that it was started by."""
    command = command_again(run)
    body = (
        paragraph("From Twinview's folder, with this configuration, under another name:")
        + code(command)
        + paragraph(
            "On as many CPU ranks and with the same versions, the same numbers come out, to the last bit. "
            + ("" if run.world_size else "How many ranks there were is not recorded: one is assumed.")
        )
    )
    started = [row for start in run.starts if (row := _start(start))]
    if started:
        body += table("As it was started", ["when", "at step", "command"], started, kind="words")
    is_in_place = run.stored.get("name") == run.path.resolve().name  # a run that was renamed cannot be gone on with
    if run.checkpoint and not run.is_finished and not run.is_running and is_in_place:
        body += paragraph("To go on with it instead of starting anew:") + code(command_to_go_on(run))
    return body


def command_again(run: RunRecord) -> str:
    """The command that trains a run of this configuration under another name."""
    return _pretrain(run, f"--name={run.stored.get('name', run.path.name)}{AGAIN}")


def command_to_go_on(run: RunRecord) -> str:
    """The command that takes the run up again where it lies."""
    return _pretrain(run, f"--runs_dir={run.path.parent}")


def _pretrain(run: RunRecord, *words: str) -> str:
    ranks = run.world_size or 1
    launcher = ["deepspeed", "--num_gpus", str(ranks)] if ranks > 1 else ["python"]
    return shlex.join([*launcher, "train/pretrain.py", f"--config={run.path / CONFIG_FILE}", *words])


def _start(start: Mapping[str, Any]) -> list[str]:
    command, when, step = start.get("command"), start.get("time"), start.get("step")
    if not isinstance(command, str) or not isinstance(when, int | float):
        return []
    try:
        date = datetime.datetime.fromtimestamp(when, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return []
    return [date, str(step), command]
