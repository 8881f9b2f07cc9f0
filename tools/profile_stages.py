"""Measures a run's stages: each of the loader's, each of the training step's, either side, and both together.

What is measured are the run's own parts, built as `train.run` builds them, on the user's own rows in the run's order.
Nothing is written, in no run directory either. With a launcher, all ranks measure at the same time, as they would
work; figures are of all of them together.
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.build import num_views
from model.ema import WeightAverage
from pipelines.batch import Batch, Loader
from tools.profile_batch_work import Times
from tools.profile_communication import COMMUNICATION, communication_named
from tools.profile_loader import LoaderBench, loader_times, run_batches, seconds_alone, touch
from tools.profile_memory import activation_bytes_per_image, flops_per_image, peak_bytes, reset_peak, state_bytes
from tools.profile_results import STAGES, Profile, Stage, rate
from tools.profile_step import PARTS, Stepper, slowest_rank, steps_in
from train.config import PretrainConfig, resolved_dict
from train.engine import init_process_group
from train.metrics import LogConfig
from train.online.config import OnlineConfig
from train.preflight import preflight
from train.run import Checked, build_engine, build_loaders, check, initial_method, set_up_machine
from train.runtime import cores_per_rank, package_versions, read_ranks

ROOT = Path(__file__).resolve().parents[1]
KEPT_BATCHES = 2  # that the step is fed from
PATIENCE = 3.0  # times as long as was asked for: then a machine that has become slower is measured as far as it is


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """How much is measured."""

    seconds: float = 3.0
    """That each stage is measured for, about; more where three batches take longer."""
    command: str = ""
    """What the profile names as its command; empty: this process's."""

    def __post_init__(self) -> None:
        if not 0.0 < self.seconds <= 3600.0:
            raise ValueError(f"`seconds` must be above 0 and at most 3600, got {self.seconds}")


def measure_profile(config: PretrainConfig, settings: ProfileSettings) -> Profile:
    """Measure what a run of `config` does, on this machine. All ranks must call.

    All get the same figures, but for each one's own spreads.

    Args:
        config: the run's; its run directory is neither read nor written.
        settings: how long.

    Raises:
        ValueError: the configuration or the data cannot be used.
        OSError: likewise.
        UnfitEnvironment: this machine lacks something.
        RunFailed: the ranks differ, or a step is not finite.
    """
    quiet = without_traces(config)
    with communication_named():
        checked = check(quiet, read_ranks())
        set_up_machine(checked)
        reset_peak(checked.device)
        with closing(build_loaders(checked)) as loaders:
            init_process_group(checked.device, config.train.hang_timeout_s)
            preflight(checked.ranks, config=quiet, data_identity=loaders.identity())
            found = _measure(checked, loaders.of(0), settings)
    gc.collect()
    if checked.device.type == "cuda":
        torch.cuda.empty_cache()
    return _profile(config, checked, found, settings)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was measured on this rank, and means and slowest ones over all."""

    times: dict[str, Times]
    means: dict[str, float]
    """Seconds of each stage for a rank's batch: the mean of the ranks' medians."""
    loading: float
    """Seconds between two batches, on the slowest rank; likewise the others."""
    training: float
    together: float
    waited: float
    counts: dict[str, float]


def without_traces(config: PretrainConfig) -> PretrainConfig:
    """The same work, with a run directory in which nothing can be written, and nobody watching."""
    return replace(
        config,
        runs_dir=os.devnull,
        log=LogConfig(),
        online=OnlineConfig(),
        schedule=replace(config.schedule, sizes=None),
        train=replace(config.train, keep_best="none"),
    )


def _measure(checked: Checked, loader: Loader, settings: ProfileSettings) -> _Found:
    config, ranks, device = checked.config, checked.ranks, checked.device
    method = initial_method(config)
    engine = build_engine(config, method, ranks, device)
    bench = LoaderBench(
        loader=loader,
        device=device,
        num_threads=config.data.num_threads or cores_per_rank(ranks),
        batches_ahead=config.data.batches_ahead,
        seconds=settings.seconds,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        meet=engine.barrier,
    )
    average = WeightAverage(method, config.train.ema_decay) if config.train.ema_decay else None
    stepper = Stepper(engine, method, device, average)

    engine.barrier()
    times, stored_bytes = loader_times(bench)
    per_batch = sum(statistics.median(times[name].seconds) for name in times if name != "storage_cold")
    touch(bench, 2 * config.data.batches_ahead + round(settings.seconds / max(per_batch, 1e-9)))
    engine.barrier()
    alone = seconds_alone(bench)

    engine.barrier()
    kept = _keep(loader)
    num_steps = stepper.number_of_steps(kept[0], settings.seconds / 2)
    whole, parts = stepper.measure(kept, num_steps, PATIENCE * settings.seconds)
    with closing(run_batches(loader)) as batches:
        together, waited = stepper.together(batches, steps_in(settings.seconds, whole, device, most=2 * num_steps))
    counts = _counts(checked, stepper, kept[0], stored_bytes)

    times |= _step_times(parts, ranks.world_size)
    medians = {name: torch.tensor(statistics.median(of.seconds), dtype=torch.float64) for name, of in times.items()}
    means = engine.mean_over_ranks(medians)
    sides = slowest_rank([statistics.median(alone), statistics.median(whole), together], device)
    return _Found(
        times=times,
        means=means,
        loading=sides[0],
        training=sides[1],
        together=sides[2],
        waited=engine.mean_over_ranks({"waited": torch.tensor(waited)})["waited"],
        counts=counts,
    )


def _keep(loader: Loader) -> list[Batch]:
    """Batches in memory."""
    with closing(run_batches(loader)) as batches:
        return [next(batches) for _ in range(KEPT_BATCHES)]


def _step_times(parts: list[dict[str, float]], world_size: int) -> dict[str, Times]:
    """Of each part of the step, by what it is."""
    apart = "" if world_size == 1 else ", less the exchanges within"
    how = {
        "forward": f"encoder and projection head{apart}",
        "loss": f"of the global batch{apart}; with micro-batches its gradients as well",
        "backward": f"through the network{apart}",
        COMMUNICATION: f"gradients, the loss's projections and batch norm's statistics, over {world_size} ranks; "
        "a rank's wait for a later one counts",
        "optimizer": "the update, the look for NaN, moving averages",
    }
    names = [name for name in PARTS if name != COMMUNICATION or world_size > 1]
    return {name: Times(seconds=[part[name] for part in parts], how=how[name]) for name in names}


def _counts(checked: Checked, stepper: Stepper, batch: Batch, stored_bytes: float) -> dict[str, float]:
    """Bytes, parameters and operations."""
    config, method, device = checked.config, stepper.method, checked.device
    autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": config.train.precision == "bf16"}
    peak = peak_bytes(device)
    state = state_bytes(
        method, stepper.engine.optimizer, zero_stage=config.train.zero_stage, world_size=checked.ranks.world_size
    )
    micro = [view[: config.train.micro_batch_size] for view in batch.views]
    return {
        "bytes_per_image_stored": stored_bytes,
        "bytes_per_image_to_device": _batch_bytes(batch) / batch.num_images,
        "parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "flops_per_image": flops_per_image(method, micro, autocast),
        "peak_bytes": peak,
        "activation_bytes_per_image": activation_bytes_per_image(method, micro, autocast),
        "state_bytes": state,
    }


def _batch_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (*batch.views, batch.labels))


def _profile(config: PretrainConfig, checked: Checked, found: _Found, settings: ProfileSettings) -> Profile:
    ranks, device, global_batch_size = checked.ranks, checked.device, config.data.global_batch_size
    counts, encoder = found.counts, config.model.encoder
    return Profile(
        stages={name: _stage(name, found, global_batch_size, device) for name in STAGES if name in found.times},
        loading_images_per_sec=rate(found.loading, global_batch_size),
        training_images_per_sec=rate(found.training, global_batch_size),
        together_images_per_sec=rate(found.together, global_batch_size),
        data_wait=_data_wait(found, device),
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        local_batch_size=global_batch_size // ranks.world_size,
        global_batch_size=global_batch_size,
        num_samples=checked.data.num_samples,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        num_cores=cores_per_rank(ranks),
        loader=config.data.loader,
        num_threads=config.data.num_threads or cores_per_rank(ranks),
        cpu_threads=config.train.cpu_threads or cores_per_rank(ranks),
        precision=config.train.precision,
        encoder={"depth": encoder.depth, "width": encoder.width, "sk": encoder.selective_kernel},
        image_side=config.augment.size,
        num_views=num_views(config.model),
        bytes_per_image_stored=counts["bytes_per_image_stored"],
        bytes_per_image_to_device=counts["bytes_per_image_to_device"],
        parameters=int(counts["parameters"]),
        gradient_bytes=4 * int(counts["parameters"]),  # averaged in float32, whatever the precision
        memory={name: counts[name] for name in ("peak_bytes", "activation_bytes_per_image", "state_bytes")},
        flops_per_image=counts["flops_per_image"],
        config=resolved_dict(config),
        environment=_environment(),
        command=settings.command or shlex.join(sys.orig_argv),
    )


def _stage(name: str, found: _Found, global_batch_size: int, device: torch.device) -> Stage:
    times, mean = found.times[name], found.means[name]
    lower, median, upper = statistics.quantiles(times.seconds, n=4) if len(times.seconds) > 1 else (mean, mean, mean)
    training = name in PARTS
    return Stage(
        name=name,
        images_per_sec=rate(mean, global_batch_size),
        side="training" if training else "loading",
        seconds_per_batch=mean,
        spread=(upper - lower) / max(median, 1e-12),
        how=times.how,
        place="device" if training and device.type == "cuda" else times.place,
    )


def _data_wait(found: _Found, device: torch.device) -> float:
    """Share of the time together in which the step waited; the loader's own work on a GPU is not waiting."""
    work = 0.0
    if device.type == "cuda":
        on_gpu = [name for name in ("crop", "photometric") if name in found.times]
        work = sum(found.means[name] for name in on_gpu if found.times[name].place == "device")
    return min(1.0, max(0.0, found.waited - work) / max(found.together, 1e-12))


def _environment() -> dict[str, Any]:
    """Versions, commit, host and its load."""
    git = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "versions": package_versions(),
        "commit": commit or "unknown",
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cores": len(os.sched_getaffinity(0)),
        "load": list(os.getloadavg()),
    }


def _processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
