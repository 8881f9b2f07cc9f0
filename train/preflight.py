"""Before the first step: every rank tells all others what it is about to run, and all stop where one differs.

Ranks that differ train something that nobody asked for, or wait for one another for ever. What is told are small JSON
texts; they travel as bytes, over a gloo group of their own, so that ranks that differ in their device can still talk.
Their sizes are exchanged first, so nothing that is told can make the exchange itself hang.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.cli import RunFailed
from train.config import PretrainConfig, flatten, resolved_dict
from train.runtime import Ranks, package_versions

logger = logging.getLogger(__name__)

PER_MACHINE = frozenset(
    {
        "runs_dir",  # a shared file system may be mounted elsewhere; what lies there is compared at the resume
        "data.path",  # copies of the set may lie anywhere; the data's identity is compared
        "data.num_threads",
        "data.batches_ahead",
        "train.cpu_threads",
    }
)
"""Fields of the configuration that may differ between machines: where things lie, and how many cores there are."""

CLOCK_TOLERANCE_S = 5.0
"""Clocks kept by NTP agree to milliseconds, and a rank may be late from the barrier by a second where the machine is
busy; more than this, and the machines' logs cannot be read side by side."""

PATIENCE = timedelta(minutes=5)  # ranks come here straight from their rendezvous
SOURCE_PACKAGES = ("native", "pipelines", "model", "train")
MAX_DIFFERENCES = 3  # in one line
REMEDIES = {
    "source": "bring all machines to one checkout of Twinview",
    "packages": "install the same packages on all machines",
    "device": "start all ranks on the same kind of device",
    "config": "start all ranks with one configuration",
    "data": "give all machines the same file",
    "clock": "set the machines' clocks by NTP",
}
"""What mends a difference, by what differs; in the order in which one explains those after it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one rank has otherwise than rank 0."""

    kind: str
    """A key of `REMEDIES`."""
    words: str
    """As the user reads it: "`optim.base_lr` is 0.2, not 0.3"."""


def preflight(ranks: Ranks, *, config: PretrainConfig, data_identity: dict[str, Any]) -> None:
    """Check that all ranks are about to run the same thing; nothing in a run of one rank. All ranks must call.

    Compared are the resolved configuration but for `PER_MACHINE`, the data, the package versions, Twinview's own
    source, the kind of device, and the clock. GPUs of different names are a warning alone.

    Args:
        ranks: of this process; the process group exists.
        config: the run's.
        data_identity: by name, what tells the data apart from other data, wherever it lies; what the configuration
            says too is left to it.

    Raises:
        RunFailed: on every rank, in the same words: which ranks differ from rank 0, on which machines, and in what.
    """
    if ranks.world_size == 1:
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of it
    statements = gather_json(statement(config, data_identity), group)
    dist.barrier(group)
    clocks = gather_json(time.time(), group)
    dist.destroy_process_group(group)
    for told, clock in zip(statements, clocks, strict=True):
        told["clock"] = clock
    if ranks.rank == 0:
        warn_of_other_gpus(statements)
    compare(statements)


def statement(config: PretrainConfig, data_identity: dict[str, Any]) -> dict[str, Any]:
    """What this rank tells the others, as JSON values; the clock comes later."""
    on_gpu = dist.get_backend() == "nccl"
    fields = flatten(resolved_dict(config))
    return {
        "host": socket.gethostname(),
        "source": source_hash(),
        "packages": package_versions(),
        "device": {"kind": "GPU" if on_gpu else "CPU", "machine": platform.machine()},
        "device_name": torch.cuda.get_device_name() if on_gpu else "",
        "config": {key: value for key, value in fields.items() if key not in PER_MACHINE},
        "data": {key: value for key, value in data_identity.items() if not {key, f"data.{key}"} & fields.keys()},
    }


def source_hash() -> str:
    """A hash over the modules that a run is made of: equal where the checkouts are, whatever git says of them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in SOURCE_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank, in rank order. All ranks of the gloo group must call.

    Args:
        value: JSON values; tuples come back as lists.
        group: default: all ranks.
    """
    ours = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world_size = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(ours)]), group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(ours)] = ours
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(texts, padded, group)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def compare(statements: list[dict[str, Any]]) -> None:
    """Hold what every rank told against what rank 0 told.

    Raises:
        RunFailed: some differ; one line, the same on every rank.
    """
    by_difference: dict[Difference, list[int]] = {}
    for rank, told in enumerate(statements):
        for difference in differences(told, statements[0]):
            by_difference.setdefault(difference, []).append(rank)
    if by_difference:
        raise RunFailed(_line(by_difference, [told["host"] for told in statements]), alike=True)


def warn_of_other_gpus(statements: list[dict[str, Any]]) -> None:
    """Say so where GPUs have different names: it works, at the pace of the slowest."""
    by_name: dict[str, list[int]] = {}
    for rank, told in enumerate(statements):
        by_name.setdefault(told["device_name"], []).append(rank)
    if len(by_name) > 1:
        hosts = [told["host"] for told in statements]
        named = "; ".join(f"{_ranks(ranks, hosts)}: {name}" for name, ranks in by_name.items())
        logger.warning("the ranks run on different GPUs, and the slowest sets the pace: %s", named)


def differences(told: dict[str, Any], first: dict[str, Any]) -> list[Difference]:
    """What a rank told otherwise than rank 0, in the order of `REMEDIES`."""
    found: list[Difference] = []
    if told["source"] != first["source"]:
        found.append(Difference(kind="source", words=f"Twinview's source is {told['source']}, not {first['source']}"))
    for kind in ("packages", "device", "config", "data"):
        for key in sorted(told[kind].keys() | first[kind].keys()):
            theirs, ours = _value(told[kind], key), _value(first[kind], key)
            if theirs != ours:
                name = {"packages": f"package {key}", "device": f"device {key}", "data": f"the data's `{key}`"}.get(
                    kind
                )
                found.append(Difference(kind=kind, words=f"{name or f'`{key}`'} is {theirs}, not {ours}"))
    ahead = told["clock"] - first["clock"]
    if abs(ahead) > CLOCK_TOLERANCE_S:
        direction = "ahead" if ahead > 0 else "behind"
        found.append(Difference(kind="clock", words=f"the clock is {abs(ahead):.0f} s {direction}"))
    return found


def _line(by_difference: dict[Difference, list[int]], hosts: list[str]) -> str:
    """One line about what differs first, and on which ranks."""
    order = list(REMEDIES)
    sorted_differences = sorted(by_difference.items(), key=lambda item: (order.index(item[0].kind), item[1]))
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for difference, ranks in sorted_differences[:MAX_DIFFERENCES]:
        by_ranks.setdefault(tuple(ranks), []).append(difference.words)
    verbs = {ranks: "differs" if len(ranks) == 1 else "differ" for ranks in by_ranks}
    parts = [
        f"{_ranks(ranks, hosts)} {verbs[ranks]} from rank 0 ({hosts[0]}): {', '.join(words)}"
        for ranks, words in by_ranks.items()
    ]
    if len(by_difference) > MAX_DIFFERENCES:
        parts.append(f"and {len(by_difference) - MAX_DIFFERENCES} more")
    return "; ".join([*parts, REMEDIES[sorted_differences[0][0].kind]])


def _ranks(ranks: tuple[int, ...] | list[int], hosts: list[str]) -> str:
    """`rank 3 (node-b)`, or `ranks 2, 4–7 (node-b, node-c)`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    numbers = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    machines = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"rank{'s' * (len(ranks) > 1)} {numbers} ({machines})"


def _value(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "missing"
