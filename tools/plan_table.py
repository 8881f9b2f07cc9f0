"""A plan in words: what is planned, a line for each number of GPUs, where it stops scaling, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.resnet import EncoderConfig
from tools.plan_config import PlanConfig
from tools.plan_costs import num_buckets, num_small
from tools.plan_model import Plan, loading_cores
from tools.plan_network import GBIT, Link
from tools.plan_scaling import REMEDY, WHY, Limit, Row, lost_shares, what_fits
from train.config import PretrainConfig

GUIDE = "docs/guides/scaling.md"
WORTH_SAYING = 0.05  # of a step, that one GPU would not lose
COLUMNS = (
    ("GPUs", 6),
    ("batch", 7),
    ("per GPU", 9),
    ("images/s", 10),
    ("efficiency", 11),
    ("computing", 10),
    ("step", 9),
    ("hours", 8),
    ("cost", 9),
    ("memory GB", 10),
)


def text_of(plan: Plan, rows: Sequence[Row], limit: Limit) -> str:
    """All of it, as the command prints it."""
    lines = [*_heads(plan), "", *_table(plan, rows), "", *_verdict(plan, rows, limit), "", "assumed"]
    lines += [f"  {line}" for line in assumptions(plan)]
    return "\n".join([in_words_of(plan.profile.device, line) for line in lines] + [f"formulas and sources: {GUIDE}"])


def in_words_of(device: str, line: str) -> str:
    """A line about GPUs, where the ranks are processes on CPUs."""
    return line if device == "cuda" else line.replace("GPUs", "ranks").replace("GPU", "rank")


def _heads(plan: Plan) -> list[str]:
    profile = plan.profile
    measured = (
        f"{_number(profile.together_images_per_sec)} images/s on {profile.world_size} × {profile.device_name} "
        f"(loading alone {_number(profile.loading_images_per_sec)}, "
        f"training alone {_number(profile.training_images_per_sec)})"
    )
    return [
        f"measured  {_run_words(plan.profiled)}: {measured}",
        f"planned   {_run_words(plan.run)}: {plan.counts.flops_per_image / 1e9:,.3g} GFLOP an image, "
        f"{plan.counts.parameters / 1e6:,.3g} M parameters, {plan.memory.per_image / 1e6:,.3g} MB of activations each",
    ]


def _run_words(run: PretrainConfig) -> str:
    train = run.train
    words = f"{encoder_words(run.model.encoder)} at {run.augment.size}², {train.precision}, ZeRO {train.zero_stage}"
    if train.micro_batch_size is not None:
        words += f", micro-batches of {train.micro_batch_size}"
    return words + ", recomputed activations" * train.activation_checkpointing


def encoder_words(encoder: EncoderConfig) -> str:
    """As its papers name it."""
    width = f" {encoder.width:g}×" * (encoder.width != 1)
    return f"ResNet-{encoder.depth}{width}{' SK' * encoder.selective_kernel}"


def _table(plan: Plan, rows: Sequence[Row]) -> list[str]:
    with_cost, with_hours = any(row.cost is not None for row in rows), any(row.hours is not None for row in rows)
    hidden = {"cost": not with_cost, "hours": not with_hours}
    shown = [(name, width) for name, width in COLUMNS if not hidden.get(name)]
    lines = ["".join(f"{name:>{width}}" for name, width in shown) + "  limited by"]
    for row in rows:
        values = _values(row)
        line = "".join(f"{values[name]:>{width}}" for name, width in shown)
        lines.append(f"{line}  {_bound_words(plan, row)}")
    return lines


def _bound_words(plan: Plan, row: Row) -> str:
    words: str = row.step.bound
    lost = lost_shares(plan, row.step.gpus)
    most = max(lost, key=lambda name: lost[name])
    if most != row.step.bound and lost[most] >= WORTH_SAYING:
        words += f", {most} {lost[most]:.0%}"
    if row.fits is False:
        words += "; does not fit"
    return words


def _values(row: Row) -> dict[str, str]:
    step = row.step
    return {
        "GPUs": str(step.gpus),
        "batch": str(step.global_batch_size),
        "per GPU": f"{step.global_batch_size / step.gpus:g}",
        "images/s": _number(step.images_per_sec),
        "efficiency": f"{row.efficiency:.0%}",
        "computing": f"{row.utilisation:.0%}",
        "step": seconds(step.seconds),
        "hours": "–" if row.hours is None else _number(row.hours),
        "cost": "–" if row.cost is None else _number(row.cost),
        "memory GB": f"{step.memory.peak / 1e9:.1f}",
    }


def _verdict(plan: Plan, rows: Sequence[Row], limit: Limit) -> list[str]:
    config = plan.config
    if limit.reason is None:
        why = "further powers of two do not divide the batch" if not plan.weak else "no more were looked at"
        lines = [f"scales to {num_gpus(limit.gpus)} (efficiency {limit.efficiency:.0%}); {why}"]
    else:
        share = limit.lost[limit.reason]
        lines = [
            f"scales to {num_gpus(limit.gpus)} (efficiency {limit.efficiency:.0%}); on {limit.beyond} it is "
            f"{limit.efficiency_beyond:.0%}, below {config.min_efficiency:.0%}",
            f"  why: {WHY[limit.reason]} ({share:.0%} of the step)",
            f"  what helps: {REMEDY[limit.reason]}",
        ]
    waiting = [row for row in rows if row.step.bound in ("loading", "storage")]
    if waiting:
        row = waiting[0]
        lines.append(
            f"training waits for {row.step.bound} on {num_gpus(row.step.gpus)} and more: {REMEDY[row.step.bound]}"
        )
    lines += _memory(plan, rows) + _storage(plan, rows)
    if config.hours is not None or config.budget is not None:
        lines.append(_answer(plan, rows))
    return lines


def _memory(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What fits into a GPU, where that was asked."""
    sizes = [row.largest_local_batch for row in rows if row.largest_local_batch is not None]
    if not sizes:
        return []
    low, high = min(sizes), max(sizes)
    number = f"{low} to {high}" if high - low > 0.02 * high else f"about {low}" if low else "not one"
    line = f"{plan.config.gpu_memory_gb:g} GB hold {number} of a GPU's images"
    small = [row.step.gpus for row in rows if row.fits is False]
    if small:
        line += f"; too few on {', '.join(map(str, small))}: --micro-batch-size or --activation-checkpointing"
    return [line]


def _storage(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What the machines must read, against what was measured."""
    most = max(rows, key=lambda row: row.read_mb_per_sec)
    reads = _number(most.read_mb_per_sec)
    line = f"each machine reads {reads} MB/s on {num_gpus(most.step.gpus)}, unless the set is in memory"
    cold = plan.profile.stages.get("storage_cold")
    if cold is None or plan.config.storage_mb_per_sec is not None:
        return [line]
    machines = max(plan.profile.world_size // plan.profile.local_world_size, 1)
    measured = cold.images_per_sec * plan.profile.bytes_per_image_stored / 1e6 / machines
    short = measured < most.read_mb_per_sec
    return [f"{line}; {_number(measured)} were measured" + "; too few: say so with --storage-mb-per-sec" * short]


def _answer(plan: Plan, rows: Sequence[Row]) -> str:
    config = plan.config
    asked = " and ".join(
        words
        for words, value in (
            (f"{config.hours:g} hours" if config.hours else "", config.hours),
            (f"a budget of {config.budget:g}" if config.budget else "", config.budget),
        )
        if value is not None
    )
    found = what_fits(plan, list(rows))
    if found is None or found.hours is None:
        return f"within {asked}: none of these"
    cost = "" if found.cost is None else f", at {_number(found.cost)}"
    return f"within {asked}: {num_gpus(found.step.gpus)}, in {_number(found.hours)} hours{cost}"


def assumptions(plan: Plan) -> list[str]:
    """Everything that the figures rest on and nobody measured for this plan."""
    config, profile, costs, network = plan.config, plan.profile, plan.costs, plan.network
    buckets = num_buckets(plan.run, plan.counts)
    local = plan.global_batch_size(1) / (1 if plan.weak else max(plan.gpus))
    lines = [
        f"GPUs are alike, and like the profile's; {config.gpus_per_node} to a machine, all of whose GPUs work together",
        "forward and backward take as many seconds for each floating-point operation as in the profile: "
        f"× {plan.compute_factor:.3g} for each image",
        f"within a machine {_link(network.inside)}; between machines {_link(network.between)}",
        f"gradients: {4 * plan.counts.parameters / 1e6:,.4g} MB in {buckets} all-reduce{'s' * (buckets > 1)}, "
        f"{config.overlap:.0%} of it hidden behind the backward",
        f"batch norm: {num_small(plan.run, plan.counts, local)} small all-reduces a step, one after the other",
        f"loading and training side by side; the shorter of the two adds {costs.interference:.0%} of itself (measured)",
        f"loading: {_number(1 / costs.load_s)} images/s for each GPU, of {loading_cores(profile)} cores "
        f"{_loading_words(config)}; {costs.area_share:.0%} of it grows with a view's pixels",
        f"memory: {_memory_words(plan)}",
        "not in it: slow ranks, checkpoints, evaluation, start-up, other users of network and storage",
    ]
    if profile.precision != plan.run.train.precision:
        lines.insert(2, f"bf16 computes {plan.speedup:g} times as fast as fp32; nobody measured it here")
    if costs.launch_s:
        each = f"{costs.launch_s * 1e6:.2g} µs for each of {plan.counts.operations} operations"
        lines.insert(2, f"forward and backward take no less than {each}")
    return lines + plan.remarks


def _loading_words(config: PlanConfig) -> str:
    words = "in the profile"
    if config.cpu_cores_per_gpu is not None:
        words += f", planned {config.cpu_cores_per_gpu:g}, in proportion"
    if config.storage_mb_per_sec is None:
        return words + "; storage as fast as needed"
    whose = "all machines together" if config.storage == "shared" else "each machine"
    return words + f"; storage {config.storage_mb_per_sec:g} MB/s for {whose}"


def _memory_words(plan: Plan) -> str:
    memory = plan.memory
    activations = "as counted"
    if plan.profile.memory.get("activation_bytes_per_image"):
        activations = f"{memory.activation_scale:.2f} of what is counted (measured)"
    measured = "measured" if plan.profile.memory.get("peak_bytes") else "assumed"
    return f"activations {activations}; {memory.rest / 1e9:.2g} GB beside model and activations ({measured})"


def _link(link: Link) -> str:
    speed = "endless" if math.isinf(link.bytes_per_sec) else f"{link.bytes_per_sec / GBIT:,.4g} Gbit/s"
    return f"{speed} and {link.latency_s * 1e6:.3g} µs a step"


def num_gpus(number: int) -> str:
    """With its noun."""
    return f"{number} GPU{'s' * (number > 1)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """With a unit that needs no zeros."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
