"""Predicts a run on other hardware from a measured profile: images/s, hours, cost, memory, and where it stops scaling.

    python -m tools.profile_throughput --config configs/imagenet_r50_simclr.yaml --json profile.json
    python -m tools.plan --profile profile.json --global-batch-size 4096 --bandwidth-gbps 100 --figure plan.png

The formulas, and where they come from, are in docs/guides/scaling.md; what was assumed is printed with every plan.
More profiles after the first refine it: of more ranks, or of another batch.

Exit codes: 0 done; 2 bad input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.plan_config import parse_plan_config
from tools.plan_figure import draw_plan
from tools.plan_model import Plan, make_plan
from tools.plan_scaling import Limit, Row, find_limit, make_row, what_fits
from tools.plan_table import assumptions, text_of
from tools.profile_results import Profile
from tools.whole_file import whole_file
from train.cli import run

FORMAT, FORMAT_VERSION = "twinview-plan", 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, predict, print, write."""
    config = parse_plan_config(arguments)
    for name in (config.json, config.figure):
        if name is not None and Path(name).is_dir():
            raise ValueError(f"{name} must name a file, got a folder")
        if name is not None and not Path(name).parent.is_dir():
            raise ValueError(f"{name} must lie in a folder that exists; make {Path(name).parent}")
    plan = make_plan([read_profile(Path(name)) for name in config.profile], config)
    rows, limit = [make_row(plan, gpus) for gpus in plan.gpus], find_limit(plan)
    print(text_of(plan, rows, limit))
    if config.json is not None:
        text = json.dumps(to_json(plan, rows, limit), indent=1, ensure_ascii=False)
        with whole_file(Path(config.json)) as file:
            file.write(f"{text}\n".encode())
    if config.figure is not None:
        image = draw_plan(plan, rows, limit)
        with whole_file(Path(config.figure)) as file:
            file.write(image)


def read_profile(path: Path) -> Profile:
    """What tools.profile_throughput wrote, or the profile alone.

    Raises:
        ValueError: it is neither, or cannot be read; names the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"`--profile` must name a file that can be read, got {path}: {error.strerror}") from error
    try:
        values = json.loads(content)
        whole = values.get("profile", values) if isinstance(values, dict) else values
        return Profile.from_json(whole)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`--profile` must name tools.profile_throughput's JSON, got {path}: {error}") from error


def to_json(plan: Plan, rows: Sequence[Row], limit: Limit) -> dict[str, Any]:
    """All numbers of a plan, as plain values."""
    found = what_fits(plan, list(rows))
    asked = plan.config.hours is not None or plan.config.budget is not None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": _finite(asdict(plan.config)),
        "measured": {
            "gpus": plan.profile.world_size,
            "images_per_sec": plan.profile.together_images_per_sec,
            "device_name": plan.profile.device_name,
        },
        "counts": asdict(plan.counts),
        "costs": _finite(asdict(plan.costs)),
        "network": _finite(asdict(plan.network)),
        "rows": [_row(row) for row in rows],
        "scales_to": asdict(limit),
        "fits": found.step.gpus if asked and found is not None else None,
        "assumptions": assumptions(plan),
    }


def _row(row: Row) -> dict[str, Any]:
    step = row.step
    return {
        "gpus": step.gpus,
        "global_batch_size": step.global_batch_size,
        "images_per_sec": step.images_per_sec,
        "efficiency": row.efficiency,
        "computing": row.utilisation,
        "limited_by": step.bound,
        "seconds_per_step": step.seconds,
        "parts_s": step.parts,
        "hours": row.hours,
        "cost": row.cost,
        "memory_bytes": asdict(step.memory) | {"peak": step.memory.peak},
        "fits": row.fits,
        "largest_local_batch": row.largest_local_batch,
        "read_mb_per_sec": row.read_mb_per_sec,
    }


def _finite(values: Any) -> Any:
    """Endless bandwidth, which JSON has no word for, as null."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return None if values == float("inf") else values


if __name__ == "__main__":
    run(main)
