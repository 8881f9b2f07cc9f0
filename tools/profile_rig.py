"""A run that can be stepped and timed without being a run: its loader and its engine, no directory, no checkpoints."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from model.ema import WeightAverage
from tools.profile_loader import run_batches
from tools.profile_results import rate
from tools.profile_step import Stepper, slowest_rank
from train.cli import RunFailed, UnfitEnvironment
from train.config import PretrainConfig, config_from_dict, flatten, resolved_dict
from train.engine import init_process_group
from train.metrics import LogConfig
from train.online.config import OnlineConfig
from train.preflight import gather_json
from train.run import Checked, build_engine, build_loaders, check, initial_method, set_up_machine
from train.runtime import Ranks
from train.stages import stage

IMPOSSIBLE = (ValueError, OSError, UnfitEnvironment, RunFailed, torch.OutOfMemoryError)
"""What says that a configuration cannot be run here."""
MIN_STEPS = 4  # of a turn
LOADER_ONLY = ("data.num_threads", "data.batches_ahead", "data.loader", "data.path", "data.geometry")
SAME_ENGINE = frozenset({*LOADER_ONLY, "data.scaled_decode", "data.photometric", "train.cpu_threads"})
"""Options that change nothing in the engine."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one stretch of steps was like."""

    images_per_sec: float
    """Source images a second, of all ranks."""
    data_wait: float
    """Share of the time in which this rank waited for the loader, 0 to 1."""
    num_steps: int


class Rig:
    """Loader and training step of a configuration.

    All ranks must make it, and call what it can do, together.

    Args:
        config: the run's.
        ranks: of this process.
        like: another one, with the same network and batch, whose engine is used; `shares_engine` tells.

    Raises:
        ValueError, OSError, UnfitEnvironment: such a run cannot be.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks, like: Rig | None = None) -> None:
        self.checked: Checked = check(only_steps(config), ranks)
        set_up_machine(self.checked)
        self._loaders = build_loaders(self.checked)
        try:
            if like is None:
                self._stepper = _stepper(self.checked)
            else:
                self._stepper = like._stepper
        except BaseException:
            self._loaders.close()
            raise
        self._batches = run_batches(self._loaders.of(0))
        self._is_loading = True

    def step(self) -> None:
        """Load a batch and train on it."""
        with stage("load"):
            batch = next(self._batches)
        self._stepper.take(batch)

    def turn(self, seconds: float) -> Turn:
        """Steps for about so many seconds, after as many as the loader has made ahead.

        Raises:
            ValueError, RunFailed: a batch cannot be made, or a step be taken.
        """
        set_up_machine(self.checked)  # the threads of whoever had the turn before were others
        config, device = self.checked.config, self.checked.device
        ahead = config.data.batches_ahead + 2
        self._wait()
        began = time.perf_counter()
        for _ in range(ahead):
            self.step()
        self._wait()
        each = slowest_rank([(time.perf_counter() - began) / ahead], device)[0]  # all ranks take as many steps
        num_steps = max(MIN_STEPS, round(seconds / max(each, 1e-6)))
        took, waited = self._stepper.together(self._batches, num_steps)
        slowest = slowest_rank([took], device)[0]
        images_per_sec = rate(slowest, config.data.global_batch_size)
        return Turn(images_per_sec=images_per_sec, data_wait=min(1.0, waited / took), num_steps=num_steps)

    def stop_loading(self) -> None:
        """End the loader and its threads; others may go on with the engine. A second call does nothing."""
        if self._is_loading:
            self._is_loading = False
            self._batches.close()
            self._loaders.close()

    def close(self) -> None:
        """Likewise, and let go of the engine."""
        self.stop_loading()
        del self._stepper
        gc.collect()  # an engine refers to itself
        if self.checked.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.checked.device.type == "cuda":
            torch.cuda.synchronize(self.checked.device)


def _stepper(checked: Checked) -> Stepper:
    """A new method and engine."""
    config, device = checked.config, checked.device
    init_process_group(device, config.train.hang_timeout_s)
    method = initial_method(config)
    engine = build_engine(config, method, checked.ranks, device)
    average = WeightAverage(method, config.train.ema_decay) if config.train.ema_decay else None
    return Stepper(engine, method, device, average)


def of_rank_zero(value: Any, ranks: Ranks) -> Any:
    """What rank 0 has, on all ranks: JSON values. All ranks must call."""
    if ranks.world_size == 1:
        return value
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of it
    told = gather_json(value, group)[0]
    dist.destroy_process_group(group)
    return told


def shares_engine(change: Iterable[str]) -> bool:
    """Whether options of these names leave the engine as it is."""
    return SAME_ENGINE.issuperset(change)


def only_steps(config: PretrainConfig) -> PretrainConfig:
    """The same without what a run does beside loading and stepping, and without a place of its own."""
    train, schedule = replace(config.train, keep_best="none"), replace(config.schedule, sizes=None)
    return replace(config, runs_dir=os.devnull, log=LogConfig(), online=OnlineConfig(), schedule=schedule, train=train)


def changed(config: PretrainConfig, change: dict[str, Any]) -> PretrainConfig:
    """The same with other values for some options, such as `{"data.num_threads": 4}`.

    Raises:
        ValueError: they do not go together.
    """
    values = resolved_dict(config)
    for name, value in change.items():
        if name not in flatten(values):
            raise ValueError(f"there is no option `{name}`")
        *sections, last = name.split(".")
        within = values
        for section in sections:
            within = within[section]
        within[last] = value
    return config_from_dict(values)
