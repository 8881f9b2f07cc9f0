"""What a step costs, taken apart: a profile's measured seconds as terms that scale each by its own law.

    compute       fixed + slope · (1 + κ(k−1)) · b   forward and backward of b images; slope ∝ floating-point operations
    loss          fixed + c · b · B              each of a rank's rows against those of all ranks
    optimizer     constant, ∝ parameters         ZeRO's saving is not counted
    gradients     all-reduce of 4 P bytes        after the backward, but for the share that is said to overlap
    small         all-reduces of batch norm      latency · count, and their few bytes
    loading       b / (rate of a rank's cores)   or of the storage, if that is slower
    step          ρ · (max(T, L) + χ · min(T, L))   T: training, L: loading, at the same time

χ is what loading and training take from each other, measured: 0 where they run side by side, 1 where they share the
same cores and simply take turns. ρ is what then is left between the parts and the run that was measured whole: caches
that both use, and noise.
κ is what ranks of one machine take from each other, from a profile of several beside one of a single one. A profile of
several ranks also tells how long all their collectives took in sum: the links are scaled by one factor to take as long.
Stages are measured apart, so that their shares are used, of the step measured whole: a plan for the profile's own
hardware gives the profile's own rate.

Shapes: b images of a rank, B of all; k ranks of a machine; P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tools.plan_counts import Counts
from tools.plan_network import Network
from tools.profile_results import Profile
from train.config import PretrainConfig
from train.engine import BUCKET_ELEMENTS

LEAST_SLOPE = 0.1  # of what an image takes, however much of a step is said to be fixed
LAUNCH_S = 20e-6  # of the host, for each operation that Python starts on a GPU; a ResNet-50 then takes 10 ms at least
LOSS_SLOWNESS = 4.0  # of its products and exponentials, against the network's convolutions; the rest is fixed
GRADIENT_BYTES = 4  # of each parameter: `communication_data_type` is fp32
STAGE_0_BUCKET = 500_000_000  # numbers that DeepSpeed's stage 0 averages at a time
OF_TRAINING = ("forward", "loss", "backward", "communication", "optimizer")
OF_AREA = ("crop", "photometric", "host_to_device")  # loading that grows with the pixels of a view


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one rank, on the profile's hardware."""

    slope_s: float
    """Forward and backward, for each image."""
    fixed_s: float
    """Of them, whatever the batch."""
    crowding: float
    """What each further rank of a machine adds to the slope, as a share of it."""
    loss_s: float
    """The loss, for each pair of a rank's image and one of the global batch."""
    loss_fixed_s: float
    """Of it, whatever the batch."""
    optimizer_s: float
    """A step."""
    load_s: float
    """Loading, for each image."""
    area_share: float
    """Of loading, that grows with the pixels of a view."""
    interference: float
    """χ."""
    residual: float
    """ρ."""
    network: Network
    """Its links."""
    launch_s: float
    """Host seconds for each operation on a GPU; 0 on a CPU, where they are in the slope."""


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Seconds of a step in which ranks talk."""

    gradients: float
    small: float
    """Batch norm's, and what looks for NaN."""
    rows: float
    """The loss's projections."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.small + self.rows


def exchanged(
    run: PretrainConfig, counts: Counts, network: Network, *, device: str, ranks: int, local_batch_size: float
) -> Exchanged:
    """Seconds of every step's collectives on so many ranks."""
    if ranks == 1:
        return Exchanged(gradients=0.0, small=0.0, rows=0.0)
    payload = GRADIENT_BYTES * counts.parameters
    buckets = num_buckets(run, counts)
    gradients = network.all_reduce_s(payload, ranks) + (buckets - 1) * network.latency_s(ranks)
    return Exchanged(
        gradients=gradients,
        small=_small_s(run, counts, network, device, ranks, local_batch_size),
        rows=_rows_s(run, counts, network, ranks, local_batch_size),
    )


def num_buckets(run: PretrainConfig, counts: Counts) -> int:
    """All-reduces that the gradients of a step are cut into."""
    return math.ceil(counts.parameters / (BUCKET_ELEMENTS if run.train.zero_stage else STAGE_0_BUCKET))


def num_passes(run: PretrainConfig, local_batch_size: float) -> int:
    """Micro-batches of a step."""
    return math.ceil(local_batch_size / min(run.train.micro_batch_size or local_batch_size, local_batch_size))


def num_small(run: PretrainConfig, counts: Counts, local_batch_size: float) -> int:
    """All-reduces of few bytes in a step."""
    return counts.small_all_reduces(
        passes=num_passes(run, local_batch_size), recomputed=run.train.activation_checkpointing
    )


def _small_s(
    run: PretrainConfig, counts: Counts, network: Network, device: str, ranks: int, local_batch_size: float
) -> float:
    """On a CPU all-reduces, in float64. On a GPU the forward gathers instead: so many bytes of every rank."""
    group = min(run.model.norm_group_size or ranks, ranks)
    passes = num_passes(run, local_batch_size)
    forwards = passes * (1 + int(passes > 1) + int(run.train.activation_checkpointing))
    latencies = num_small(run, counts, local_batch_size) * network.latency_s(group)
    if group == 1:
        return network.latency_s(ranks)
    wide = counts.norm_bytes * (1 if device == "cuda" else 2)
    backward = network.all_reduce_s(wide, group) - network.latency_s(group)
    forward = backward
    if device == "cuda":
        forward = network.all_gather_s(group * wide, group) - network.all_gather_s(0, group)
    return latencies + forwards * forward + passes * backward


def _rows_s(run: PretrainConfig, counts: Counts, network: Network, ranks: int, local_batch_size: float) -> float:
    rows = counts.num_views * local_batch_size
    if run.model.method != "simclr":
        return 0.0
    if run.model.exchange == "ring":  # rows forward, rows and their log-sum-exp backward
        return network.pass_around_s(4 * rows * counts.out_dim, ranks) + network.pass_around_s(
            4 * rows * (counts.out_dim + 1), ranks
        )
    return network.all_gather_s(4 * ranks * rows * counts.out_dim, ranks) + network.all_gather_s(
        4 * ranks * rows, ranks
    )


def measured_costs(
    profiles: Sequence[Profile], run: PretrainConfig, counts: Counts, assumed: Network
) -> tuple[Costs, list[str]]:
    """Take the first profile apart, with the help of the others.

    Args:
        profiles: of the same run on several ranks, or of several batch sizes.
        run: that the first one measured.
        counts: of that run.
        assumed: its links, as far as nobody measured them.

    Returns:
        The costs, and in lines what more was measured.

    Raises:
        ValueError: a profile lacks what is needed.
    """
    base = profiles[0]
    seconds = _shares(base)
    fixed, slope = _line(profiles)
    network, crowding, remarks = _measured_together(profiles, run, counts, assumed, fixed, slope)
    slope /= 1 + crowding * (base.local_world_size - 1)
    load_s, step_s = base.local_batch_size / (base.loading_images_per_sec / base.world_size), _step_s(base)
    together_s = base.global_batch_size / base.together_images_per_sec
    low, high = sorted((load_s, step_s))
    interference = min(max((together_s - high) / low, 0.0), 1.0)
    pairs = base.local_batch_size * base.global_batch_size
    flops_per_sec = counts.flops_per_image / slope
    pairs_s = min(seconds["loss"], LOSS_SLOWNESS * _loss_flops(counts) * pairs / flops_per_sec)
    launch_s = 0.0
    if base.device == "cuda" and run.train.compile == "off":
        launch_s = min(LAUNCH_S, (fixed + slope * base.local_batch_size) / counts.operations)
    costs = Costs(
        slope_s=slope,
        fixed_s=fixed,
        crowding=crowding,
        loss_s=pairs_s / pairs,
        loss_fixed_s=seconds["loss"] - pairs_s,
        optimizer_s=seconds["optimizer"],
        load_s=load_s / base.local_batch_size,
        area_share=_area_share(base),
        interference=interference,
        residual=together_s / (high + interference * low),
        network=network,
        launch_s=launch_s,
    )
    return costs, remarks


def _loss_flops(counts: Counts) -> float:
    """Of an image's rows with those of another one: a product forward and one backward for each pair of rows."""
    return 4.0 * counts.num_views**2 * counts.out_dim


def _step_s(profile: Profile) -> float:
    return profile.global_batch_size / profile.training_images_per_sec


def _shares(profile: Profile) -> dict[str, float]:
    """Seconds of each part of the training step, which add up to it."""
    parts = {name: profile.stages[name].seconds_per_batch if name in profile.stages else 0.0 for name in OF_TRAINING}
    if not parts["forward"] > 0 or not parts["backward"] > 0:
        raise ValueError("a profile must hold the stages `forward` and `backward`, got none; measure again")
    total = sum(parts.values())
    return {name: seconds * _step_s(profile) / total for name, seconds in parts.items()}


def _area_share(profile: Profile) -> float:
    loading = {
        name: stage.seconds_per_batch
        for name, stage in profile.stages.items()
        if stage.side == "loading" and name != "storage_cold"
    }
    total = sum(loading.values())
    return sum(loading.get(name, 0.0) for name in OF_AREA) / total if total else 0.0


def _computing_s(profile: Profile) -> float:
    """Forward and backward of a rank."""
    seconds = _shares(profile)
    return seconds["forward"] + seconds["backward"]


def _line(profiles: Sequence[Profile]) -> tuple[float, float]:
    """(fixed, slope) of forward and backward: through the first profile, and one of as many ranks and another batch."""
    base = profiles[0]
    alike = [
        profile
        for profile in profiles[1:]
        if profile.world_size == base.world_size and profile.local_batch_size != base.local_batch_size
    ]
    ours = _computing_s(base)
    through_zero = ours / base.local_batch_size
    if not alike:
        return 0.0, through_zero
    farthest = max(alike, key=lambda profile: abs(math.log(profile.local_batch_size / base.local_batch_size)))
    slope = (_computing_s(farthest) - ours) / (farthest.local_batch_size - base.local_batch_size)
    slope = min(max(slope, LEAST_SLOPE * through_zero), through_zero)
    return ours - slope * base.local_batch_size, slope


def _measured_together(
    profiles: Sequence[Profile], run: PretrainConfig, counts: Counts, assumed: Network, fixed: float, slope: float
) -> tuple[Network, float, list[str]]:
    """(links, crowding, remarks): what the profile of the most ranks tells, if there is one of several."""
    base = profiles[0]
    wide = max(profiles, key=lambda profile: profile.world_size)
    seconds = _shares(wide)["communication"]
    if wide.world_size == 1 or not seconds:
        return assumed, 0.0, []
    assumed = replace(assumed, ranks_per_node=wide.local_world_size)
    talk = exchanged(
        run, counts, assumed, device=wide.device, ranks=wide.world_size, local_batch_size=wide.local_batch_size
    )
    factor = seconds / talk.total
    remarks = [
        f"ranks that tell each other something take {factor:.2g} times as long as usual links would (measured on "
        f"{wide.world_size} ranks, waiting for one another included)"
    ]
    crowding = 0.0
    if wide.local_world_size > base.local_world_size == 1:
        crowded = _computing_s(wide) / (fixed + slope * wide.local_batch_size)
        crowding = max(crowded - 1, 0.0) / (wide.local_world_size - 1)
    if crowding:
        remarks.append(
            f"each further rank of a machine slows forward and backward of its others by {crowding:.1%} (measured on "
            f"{wide.local_world_size} of them, which share memory and caches)"
        )
    return assumed.scaled(factor, ranks=wide.world_size), crowding, remarks
