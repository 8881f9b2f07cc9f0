"""Where a plan stops scaling and why, how long it takes, what it costs, and what fits.

More GPUs are said to scale as long as efficiency is no less than `min_efficiency`; what is looked through are powers of
two that divide the batch. Why it falls: of the seconds that a step takes beyond its equal share of one GPU's step, the
part that most of them go to.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.plan_model import Plan, Reason, Step

MOST = 4096  # GPUs that are looked through

WHY: dict[Reason, str] = {
    "compute": "computing",
    "batch": "the batch is too small for so many GPUs: a step's fixed costs are no longer shared out",
    "optimizer": "the batch is too small for so many GPUs: the optimizer's step does not get shorter",
    "loss": "the loss: each row is compared with those of all GPUs",
    "network": "the network: the bytes of gradients and projections",
    "latency": "the latency of batch norm's many small all-reduces",
    "loading": "loading: the CPU cores that decode and crop",
    "storage": "storage: the bytes that images are read at",
}
REMEDY: dict[Reason, str] = {
    "compute": "a smaller encoder or view, bf16, or more GPUs",
    "batch": "a larger global batch",
    "optimizer": "a larger global batch",
    "loss": "a smaller global batch",
    "network": "a faster network, a larger batch (fewer steps for as many images), or a smaller encoder",
    "latency": "`model.norm_group_size` (statistics over fewer GPUs), a larger batch, or a network of lower latency",
    "loading": "more CPU cores for each GPU, smaller stored images, `data.loader: dali` or `resident`",
    "storage": "faster or local disks, smaller stored images, or memory that holds the set",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a number of GPUs gives."""

    step: Step
    efficiency: float
    utilisation: float
    """Share of the time in which a GPU computes (forward, backward, loss, optimizer)."""
    hours: float | None
    """Of the whole run; None where nobody said how many images it has."""
    cost: float | None
    """Of it; None without a price."""
    fits: bool | None
    """Into the memory of a GPU; None where that is not known."""
    largest_local_batch: int | None
    """That would fit."""
    read_mb_per_sec: float
    """That each machine reads, were nothing of the set in memory."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where scaling ends."""

    gpus: int
    """The most that scale."""
    efficiency: float
    """There."""
    beyond: int | None
    """The next number of GPUs that was looked at; None: none is left."""
    efficiency_beyond: float | None
    reason: Reason | None
    """Why it falls; None: it does not."""
    lost: dict[Reason, float]
    """At `beyond`, shares of the step that are more than an equal share of one GPU's, by what they go to."""


def make_row(plan: Plan, gpus: int) -> Row:
    """Predict a number of GPUs."""
    config, step = plan.config, plan.step(gpus)
    hours = run_hours(plan, step)
    capacity = None if config.gpu_memory_gb is None else 1e9 * config.gpu_memory_gb
    computing = sum(step.parts.get(name, 0.0) for name in ("compute", "batch", "loss", "optimizer"))
    return Row(
        step=step,
        efficiency=plan.efficiency(gpus),
        utilisation=computing / step.seconds,
        hours=hours,
        cost=None if hours is None or config.price_per_gpu_hour is None else hours * gpus * config.price_per_gpu_hour,
        fits=None if capacity is None else step.memory.peak <= capacity,
        largest_local_batch=None if capacity is None else plan.memory.largest_local_batch(gpus, capacity),
        read_mb_per_sec=step.images_per_sec
        * plan.network.shape(gpus)[0]
        / gpus
        * plan.profile.bytes_per_image_stored
        / 1e6,
    )


def run_hours(plan: Plan, step: Step) -> float | None:
    """Of all epochs; the last partial batch of an epoch is dropped, as in training."""
    images = plan.config.images or plan.profile.num_samples
    steps = images // step.global_batch_size
    return plan.run.train.epochs * steps * step.seconds / 3600 if steps else None


def find_limit(plan: Plan) -> Limit:
    """Go through powers of two until efficiency falls below what is asked for, or the batch is used up."""
    best, efficiency, gpus = 1, 1.0, 2
    while gpus <= MOST and plan.global_batch_size(gpus) % gpus == 0:
        reached = plan.efficiency(gpus)
        if reached < plan.config.min_efficiency:
            lost = lost_shares(plan, gpus)
            reason = max(lost, key=lambda name: lost[name])
            return Limit(
                gpus=best,
                efficiency=efficiency,
                beyond=gpus,
                efficiency_beyond=reached,
                reason=reason,
                lost=lost,
            )
        best, efficiency, gpus = gpus, reached, 2 * gpus
    return Limit(gpus=best, efficiency=efficiency, beyond=None, efficiency_beyond=None, reason=None, lost={})


def lost_shares(plan: Plan, gpus: int) -> dict[Reason, float]:
    """Of a step on so many GPUs, what each part takes beyond its equal share of one GPU's step; none below 0."""
    alone, step = plan.step(1), plan.step(gpus)
    equal = step.global_batch_size / gpus / alone.global_batch_size
    names = {**alone.parts, **step.parts}
    beyond = {name: step.parts.get(name, 0.0) - equal * alone.parts.get(name, 0.0) for name in names}
    return {name: max(seconds, 0.0) / step.seconds for name, seconds in beyond.items()}


def what_fits(plan: Plan, rows: list[Row]) -> Row | None:
    """The cheapest row within `hours`, `budget` and memory; without a price that of the fewest GPUs. None: none is."""
    config = plan.config
    good = [
        row
        for row in rows
        if row.fits is not False
        and (config.hours is None or (row.hours is not None and row.hours <= config.hours))
        and (config.budget is None or (row.cost is not None and row.cost <= config.budget))
    ]
    if not good:
        return None
    if config.hours is None:  # a budget alone: as soon as it can be
        return min(good, key=lambda row: row.hours or 0.0)
    return min(good, key=lambda row: (row.cost or 0.0, row.step.gpus))
