"""Predict a run on n GPUs: seconds of a step, images a second, efficiency, memory, and what sets the pace.

What a step costs, and by which law each part of it grows, stands in `tools.plan_costs`; here the parts are scaled to
another configuration and number of ranks. Efficiency is images a second over n times those of one GPU of the same plan:
with the same global batch (strong scaling), or the same batch on each GPU (weak scaling). It is
never above 1, but where one GPU needs micro-batches and n do not.

Shapes: n ranks, b images of a rank, B = n · b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from tools.plan_config import PlanConfig, planned_run
from tools.plan_costs import Costs, exchanged, measured_costs, num_passes
from tools.plan_counts import Counts, count
from tools.plan_memory import ASSUMED_REST, Memory, MemoryModel
from tools.plan_network import GBIT, Network, usual_network
from tools.profile_results import Profile
from train.config import PretrainConfig

FORWARD_TWICE = 4 / 3  # a backward is two forwards, and one forward comes to it
GPUS = (1, 2, 4, 8, 16, 32, 64)
CONTRADICTED = 1.25  # times as much, or as little, as a further profile measured
BF16_SPEEDUP = {"cuda": 2.0, "cpu": 1.0}
Reason = Literal["compute", "batch", "optimizer", "loss", "network", "latency", "loading", "storage"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step on n GPUs, and what follows from them."""

    gpus: int
    global_batch_size: int
    parts: dict[Reason, float]
    """Seconds, by what they go to; they add up to `seconds`. `compute` is what all GPUs would take with nothing in
    their way, `batch` what a small batch adds to it, `network` the bytes of gradients and projections, `latency` the
    many small all-reduces, `loading` or `storage` the wait for images."""
    bound: Reason
    """What sets the pace: images, where training waits for them; else the largest part of the training step."""
    memory: Memory

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def images_per_sec(self) -> float:
        """Source images, all GPUs."""
        return self.global_batch_size / self.seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A measured run, and the one that is planned from it."""

    config: PlanConfig
    profile: Profile
    profiled: PretrainConfig
    """That was measured."""
    run: PretrainConfig
    """That is planned; its batch is that of one GPU in weak scaling."""
    measured: Counts
    """Of the profile's run."""
    counts: Counts
    """Of the planned run."""
    costs: Costs
    """On the profile's hardware, of the profile's run."""
    network: Network
    """That is planned."""
    remarks: list[str]
    """What was learned from further profiles."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """Numbers of GPUs that are asked for, rising; by default powers of two that divide the batch."""
        return self.config.gpus or tuple(gpus for gpus in GPUS if self.global_batch_size(gpus) % gpus == 0)

    @property
    def weak(self) -> bool:
        """Whether the batch grows with the GPUs."""
        return self.config.local_batch_size is not None

    @property
    def is_as_measured(self) -> bool:
        """Whether what is planned on as many GPUs as were measured is what was measured."""
        same_batch = self.global_batch_size(self.profile.world_size) == self.profile.global_batch_size
        return same_batch and self.run.model == self.profiled.model and _step_of(self.run) == _step_of(self.profiled)

    def global_batch_size(self, gpus: int) -> int:
        """B on so many GPUs."""
        return self.run.data.global_batch_size * (gpus if self.weak else 1)

    @property
    def compute_factor(self) -> float:
        """Seconds of an image's forward and backward, as a multiple of the profile's."""
        flops = self.counts.flops_per_image / self.measured.flops_per_image
        if self.run.train.precision == self.profile.precision:
            return flops
        return flops * (self.speedup if self.run.train.precision == "fp32" else 1 / self.speedup)

    @property
    def speedup(self) -> float:
        """Of bf16 over fp32."""
        return self.config.precision_speedup or BF16_SPEEDUP[self.profile.device]

    @cached_property
    def memory(self) -> MemoryModel:
        """Of the planned run."""
        theirs = _memory(self.profiled, self.measured)
        found = self.profile.memory.get("activation_bytes_per_image") or 0.0
        scale = found / theirs.per_image if found > 0 else 1.0
        theirs, ours = (replace(model, activation_scale=scale) for model in (theirs, _memory(self.run, self.counts)))
        rest = ASSUMED_REST[self.profile.device]
        if peak := self.profile.memory.get("peak_bytes"):
            rest = max(peak - theirs.at(self.profile.world_size, self.profile.local_batch_size).peak, 0.0)
        return replace(ours, rest=rest)

    def loading_s(self, gpus: int) -> tuple[float, Reason]:
        """Seconds in which a rank's cores, or the storage, deliver an image to it; and which of them."""
        side = self.run.augment.size / self.profile.image_side
        by_cores = self.costs.load_s * (1 + self.costs.area_share * (side**2 - 1))
        if self.config.cpu_cores_per_gpu is not None:
            by_cores *= loading_cores(self.profile) / self.config.cpu_cores_per_gpu
        if self.config.storage_mb_per_sec is None:
            return by_cores, "loading"
        readers = gpus if self.config.storage == "shared" else self.network.shape(gpus)[0]
        by_storage = readers * self.profile.bytes_per_image_stored / (1e6 * self.config.storage_mb_per_sec)
        return (by_storage, "storage") if by_storage > by_cores else (by_cores, "loading")

    def step(self, gpus: int) -> Step:
        """Predict a step; the batch need not be a multiple of the GPUs."""
        batch = self.global_batch_size(gpus)
        local = batch / gpus
        training = self._training_s(gpus, local)
        each, source = self.loading_s(gpus)
        train_s, load_s = sum(training.values()), each * local
        low, high = sorted((train_s, load_s))
        total = self.costs.residual * (high + self.costs.interference * low)
        bound: Reason = source if load_s > train_s else max(training, key=lambda name: training[name])
        parts = {name: self.costs.residual * seconds for name, seconds in training.items()}
        parts[source] = total - self.costs.residual * train_s
        return Step(
            gpus=gpus,
            global_batch_size=batch,
            parts=parts,
            bound=bound,
            memory=self.memory.at(gpus, local),
        )

    def efficiency(self, gpus: int) -> float:
        """Images a second over n times those of one GPU."""
        return self.step(gpus).images_per_sec / (gpus * self.step(1).images_per_sec)

    def _passes_factor(self, local: float) -> float:
        """Micro-batches go forward twice; as a multiple of what the profile's images did."""
        ours, before = (
            FORWARD_TWICE if num_passes(run, batch) > 1 else 1.0
            for run, batch in ((self.run, local), (self.profiled, self.profile.local_batch_size))
        )
        return ours / before

    def _training_s(self, gpus: int, local: float) -> dict[Reason, float]:
        costs, counts = self.costs, self.counts
        bigger = counts.parameters / self.measured.parameters
        crowded = 1 + costs.crowding * (self.network.shape(gpus)[0] - 1)
        compute = crowded * costs.slope_s * self.compute_factor * self._passes_factor(local) * local
        floor = costs.launch_s * counts.operations
        talk = exchanged(self.run, counts, self.network, device=self.profile.device, ranks=gpus, local_batch_size=local)
        hidden = self.config.overlap * min(talk.gradients, compute * 2 / 3)  # the backward is two thirds of it
        return {
            "compute": compute,
            "batch": costs.fixed_s + max(floor - compute - costs.fixed_s, 0.0),
            "loss": costs.loss_fixed_s + costs.loss_s * local * self.global_batch_size(gpus),
            "optimizer": costs.optimizer_s * bigger,
            "network": talk.gradients - hidden + talk.rows,
            "latency": talk.small,
        }


def make_plan(profiles: Sequence[Profile], config: PlanConfig) -> Plan:
    """Plan from measured profiles.

    Args:
        profiles: of `config.profile`.
        config: what is asked for.

    Raises:
        ValueError: the profiles are not of one run, or the plan cannot be.
    """
    profile = profiles[0]
    check_alike(profiles)
    if config.cpu_cores_per_gpu is not None and profile.device == "cpu":
        raise ValueError("`--cpu-cores-per-gpu` needs a GPU's profile, got a CPU's, whose cores also compute")
    unchanged = planned_run(profile, PlanConfig(profile=config.profile))
    run = planned_run(profile, config)
    measured = count(unchanged)
    counts = measured if run.model == unchanged.model and _step_of(run) == _step_of(unchanged) else count(run)
    device: Literal["cpu", "cuda"] = "cuda" if profile.device == "cuda" else "cpu"
    costs, remarks = measured_costs(
        profiles, unchanged, measured, usual_network(device, max(each.local_world_size for each in profiles))
    )
    plan = Plan(
        config=config,
        profile=profile,
        profiled=unchanged,
        run=run,
        measured=measured,
        counts=counts,
        costs=costs,
        network=planned_network(config, costs.network),
        remarks=remarks,
    )
    plan.remarks.extend(_contradictions(plan, profiles[1:]))
    for gpus in plan.gpus:
        if plan.global_batch_size(gpus) % gpus:
            batch = plan.global_batch_size(gpus)
            below = max(number for number in range(1, gpus) if batch % number == 0)
            raise ValueError(f"`--gpus` must divide the global batch of {batch} images, got {gpus}; use {below}")
    return plan


def _contradictions(plan: Plan, others: Sequence[Profile]) -> list[str]:
    """Further profiles whose rates the model does not give back: a line for each."""
    found = []
    for other in others:
        run = planned_run(plan.profile, PlanConfig(profile=("",), global_batch_size=other.global_batch_size))
        network = replace(plan.costs.network, ranks_per_node=other.local_world_size)
        theirs = replace(plan, config=PlanConfig(profile=("",)), run=run, counts=plan.measured, network=network)
        ours, measured = theirs.step(other.world_size).images_per_sec, other.together_images_per_sec
        if not 1 / CONTRADICTED < ours / measured < CONTRADICTED:
            found.append(
                f"the profile of {other.world_size} × {other.local_batch_size} images has {measured:,.0f} images/s, "
                f"of which the model makes {ours:,.0f}: measure both profiles anew while nothing else runs"
            )
    return found


def _step_of(run: PretrainConfig) -> tuple[int, str, bool]:
    return run.augment.size, run.train.precision, run.train.activation_checkpointing


def planned_network(config: PlanConfig, measured: Network) -> Network:
    """The measured or assumed links, but for those that `config` names."""
    inside, between = measured.inside, measured.between
    if config.intra_node_gbps is not None:
        inside = replace(inside, bytes_per_sec=config.intra_node_gbps * GBIT)
    if config.intra_node_latency_us is not None:
        inside = replace(inside, latency_s=1e-6 * config.intra_node_latency_us)
    if config.bandwidth_gbps is not None:
        between = replace(between, bytes_per_sec=config.network_efficiency * config.bandwidth_gbps * GBIT)
    if config.latency_us is not None:
        between = replace(between, latency_s=1e-6 * config.latency_us)
    return replace(measured, inside=inside, between=between, ranks_per_node=config.gpus_per_node)


def _memory(run: PretrainConfig, counts: Counts) -> MemoryModel:
    return MemoryModel(
        counts=counts,
        zero_stage=run.train.zero_stage,
        bf16=run.train.precision == "bf16",
        ema=run.train.ema_decay > 0,
        micro_batch_size=run.train.micro_batch_size,
    )


def loading_cores(profile: Profile) -> int:
    """Cores that a rank's loader keeps busy."""
    return max(min(profile.num_threads or profile.num_cores, profile.num_cores), 1)


def check_alike(profiles: Sequence[Profile]) -> None:
    """Refuse profiles of different runs, devices or precisions.

    Raises:
        ValueError: names the first difference.
    """
    base = profiles[0]
    for profile in profiles:
        for name in ("device", "device_name", "precision", "encoder", "image_side", "loader"):
            ours, theirs = getattr(base, name), getattr(profile, name)
            if ours != theirs:
                raise ValueError(f"`--profile` must name profiles of one run, got {name} {ours} and {theirs}")
        rates = (profile.loading_images_per_sec, profile.training_images_per_sec, profile.together_images_per_sec)
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"`--profile` must hold rates above 0, got {', '.join(map(str, rates))}; measure again")
        if profile.device not in BF16_SPEEDUP:
            raise ValueError(f"`--profile` must be of cpu or cuda, got {profile.device}")
        if profile.local_batch_size * profile.world_size != profile.global_batch_size:
            raise ValueError(
                f"`--profile` must have a global batch of {profile.world_size} times its local one, got "
                f"{profile.global_batch_size} and {profile.local_batch_size}; measure again"
            )
