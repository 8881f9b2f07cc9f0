"""What `python -m tools.plan` is told, and the run that is planned: the profile's, with what shall be different.

Command line → `PlanConfig`; profile and `PlanConfig` → the configuration of a run, as `train.config` knows it, and so
with its checks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from tools.profile_results import Profile
from train.config import PretrainConfig, config_from_dict

MAX_GPUS = 65536
Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is asked for. None: as in the profile, or not asked."""

    profile: tuple[str, ...]
    """JSON files of tools.profile_throughput. The first is what is planned from; others refine it: of more ranks, the
    links; of as many ranks and another batch, what a step costs beside its images."""
    gpus: tuple[int, ...] | None = None
    """Numbers of GPUs (ranks) to predict (default: of 1,2,4,8,16,32,64 those that divide the batch)."""
    gpus_per_node: int = 8
    """GPUs of each machine."""
    bandwidth_gbps: float | None = None
    """Network of each machine, Gbit/s one way (default: measured between machines, or 100)."""
    network_efficiency: float = 0.8
    """Share of `bandwidth_gbps` that arrives."""
    latency_us: float | None = None
    """Of a step between machines, microseconds (default: measured, or 10 for GPUs and 50 for gloo)."""
    intra_node_gbps: float | None = None
    """Between GPUs of a machine: bus bandwidth, Gbit/s (default: measured, or 1600: NVLink's)."""
    intra_node_latency_us: float | None = None
    """Of a step within a machine (default: measured, or 3 for GPUs and 40 for gloo)."""
    overlap: float = 0.0
    """Share of the gradients' communication that hides behind the backward; ours begins after it."""
    global_batch_size: int | None = None
    """Images a step, however many GPUs."""
    local_batch_size: int | None = None
    """Images of a GPU in a step, instead: the global batch grows with the GPUs."""
    size: int | None = None
    """Side of a view."""
    depth: int | None = None
    """Of the encoder."""
    width: float | None = None
    """Of the encoder."""
    selective_kernel: bool | None = None
    """Of the encoder."""
    precision: Literal["bf16", "fp32"] | None = None
    """Of the run."""
    precision_speedup: float | None = None
    """How many times as fast bf16 is (default: 2 on GPUs, 1 on CPUs), where `precision` is not the profile's."""
    zero_stage: Literal[0, 1, 2] | None = None
    """Of DeepSpeed."""
    micro_batch_size: int | None = None
    """Images in the network at a time."""
    activation_checkpointing: bool | None = None
    """Recompute blocks in the backward."""
    cpu_cores_per_gpu: float | None = None
    """Cores that load images for each GPU."""
    storage_mb_per_sec: float | None = None
    """What images are read at, 10⁶ bytes a second (default: as fast as needed)."""
    storage: Literal["per_node", "shared"] = "per_node"
    """Whether each machine reads so much, or all together."""
    gpu_memory_gb: float | None = None
    """Of each GPU, 10⁹ bytes."""
    images: int | None = None
    """Of the set."""
    epochs: int | None = None
    """Passes over it."""
    price_per_gpu_hour: float | None = None
    """In any currency."""
    hours: float | None = None
    """At most, for the whole run."""
    budget: float | None = None
    """At most, for the whole run, in the currency of the price."""
    min_efficiency: float = 0.7
    """Below it, more GPUs are said not to scale."""
    json: str | None = None
    """File for all numbers."""
    figure: str | None = None
    """PNG file for the picture."""

    def __post_init__(self) -> None:
        if not self.profile:
            raise ValueError("`--profile` must name at least one file, got none")
        if self.gpus is not None and not (self.gpus and all(1 <= number <= MAX_GPUS for number in self.gpus)):
            raise ValueError(f"`--gpus` must be numbers from 1 to {MAX_GPUS} such as 1,2,8, got {self.gpus}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._check_number(field.name, value)
        if self.global_batch_size is not None and self.local_batch_size is not None:
            raise ValueError("`--global-batch-size` and `--local-batch-size` exclude each other, got both")
        if self.budget is not None and self.price_per_gpu_hour is None:
            raise ValueError("`--budget` needs `--price-per-gpu-hour`, got none")
        if self.figure is not None and not self.figure.endswith(".png"):
            raise ValueError(f"`--figure` must be named *.png, got {self.figure}")
        if self.json is not None and self.json == self.figure:
            raise ValueError(f"`--json` and `--figure` must name different files, got {self.json} twice")

    def _check_number(self, name: str, value: float) -> None:
        option = f"`--{name.replace('_', '-')}`"
        if name in ("network_efficiency", "min_efficiency") and not 0 < value <= 1:
            raise ValueError(f"{option} must be in (0, 1], got {value}")
        if name == "overlap" and not 0 <= value <= 1:
            raise ValueError(f"{option} must be in [0, 1], got {value}")
        endless = name in ("bandwidth_gbps", "intra_node_gbps", "storage_mb_per_sec") and value == math.inf
        free = name in ("overlap", "zero_stage", "price_per_gpu_hour", "latency_us", "intra_node_latency_us")
        if not endless and not (math.isfinite(value) and (value > 0 or (free and value == 0))):
            raise ValueError(f"{option} must be a {'number from 0' if free else 'positive number'}, got {value}")


def planned_run(profile: Profile, config: PlanConfig) -> PretrainConfig:
    """The profile's run with what `config` changes; where `local_batch_size` is set, its batch is that of one GPU.

    Raises:
        ValueError: the profile's configuration is another version's, or the changes do not go together.
    """
    try:
        run = config_from_dict(profile.config)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the profile's `config` is no run's of this version ({error}); measure again") from error
    encoder = _changed(
        run.model.encoder, depth=config.depth, width=config.width, selective_kernel=config.selective_kernel
    )
    train = _changed(
        run.train,
        precision=config.precision,
        zero_stage=config.zero_stage,
        micro_batch_size=config.micro_batch_size,
        activation_checkpointing=config.activation_checkpointing,
        epochs=config.epochs,
    )
    augment = _changed(run.augment, size=config.size)
    schedule = run.schedule if config.size is None else replace(run.schedule, sizes=None)
    data = _changed(run.data, global_batch_size=config.global_batch_size or config.local_batch_size)
    return replace(
        run,
        data=data,
        augment=augment,
        schedule=schedule,
        train=train,
        model=replace(run.model, encoder=encoder),
    )


def _changed(part: Part, **values: Any) -> Part:
    """A copy of a configuration's part with the values that are not None."""
    return replace(part, **{name: value for name, value in values.items() if value is not None})  # type: ignore[type-var]


def parse_plan_config(arguments: Sequence[str] | None = None) -> PlanConfig:
    """Read the command line; an option's help is what stands below its field.

    Raises:
        ValueError: an unknown option, or a value that cannot be; one line.
    """
    parser = _Parser(prog="python -m tools.plan", description="Predict a run on other hardware.", allow_abbrev=False)
    words = {param.arg_name: param.description for param in parse_from_object(PlanConfig).params}
    for name, kind in get_type_hints(PlanConfig).items():
        option, about = f"--{name.replace('_', '-')}", (words[name] or "").replace("%", "%%")
        plain = next((inner for inner in get_args(kind) if inner is not type(None)), kind)
        if name == "profile":
            parser.add_argument(option, nargs="+", required=True, metavar="FILE", help=about)
        elif name == "gpus":
            parser.add_argument(option, type=_numbers, metavar="N,N,…", help=about)
        elif plain is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=about)
        elif choices := _choices(kind):
            parser.add_argument(option, type=type(choices[0]), choices=choices, help=about)
        else:
            parser.add_argument(option, type=plain, metavar=plain.__name__.upper(), help=about)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return PlanConfig(**given | {"profile": tuple(given["profile"])})


def _choices(kind: Any) -> tuple[Any, ...]:
    """Of a `Literal`, or a `Literal` or None."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((get_args(inner) for inner in get_args(kind) if get_origin(inner) is Literal), ())


class _Parser(argparse.ArgumentParser):
    """Complains by ValueError, hence in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `--help` lists all options")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 1,2,8, got {text!r}") from error
