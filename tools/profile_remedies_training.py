"""What can be changed on the training side, and what the model expects of it; as `tools.profile_remedies`."""

from __future__ import annotations

from collections.abc import Iterator

from tools.profile_case import Advice, Case
from tools.profile_model import Costs

BF16_GPU_FACTOR = 0.5  # tensor cores have at least twice the rate of what float32 gets
BF16_CPU_FACTOR = 0.65  # ResNet-10 to 50 on one core with AVX-512's bfloat16: 0.55 to 0.68
FP32_CPU_FACTOR = 0.8  # where bfloat16 is emulated; cautious
COMPILE_FACTOR = 0.85  # of forward and backward on a GPU: fused elementwise kernels; cautious
SHARE_OF_MEMORY = 0.85  # that a larger batch may take, by what activations were measured to take
ROOM_TO_KEEP = 0.3  # of the memory taken with activation checkpointing: without it there is room then, on any ResNet


def precision(case: Case) -> Iterator[Advice]:
    """Bfloat16 where the device has instructions for it, else not."""
    effect = "rounding; a run keeps the precision that it began with"
    if case.profile.precision == "fp32" and case.around.fast_bf16:
        factor = BF16_GPU_FACTOR if case.on_gpu else BF16_CPU_FACTOR
        why = f"{case.profile.device_name} multiplies bfloat16 faster; weights, losses and statistics stay float32"
        yield case.advice({"train.precision": "bf16"}, why, _network(case.costs, factor), effect)
    if case.profile.precision == "bf16" and not case.around.fast_bf16 and not case.on_gpu:
        why = f"{case.profile.device_name} has no instructions for bfloat16 and computes it by way of float32"
        yield case.advice({"train.precision": "fp32"}, why, _network(case.costs, FP32_CPU_FACTOR), effect)


def recomputation(case: Case) -> Iterator[Advice]:
    """Activations kept instead of computed twice, where there is room."""
    costs, profile = case.costs, case.profile
    forward, backward = costs.device.get("forward", 0.0), costs.device.get("backward", 0.0)
    room = profile.memory["peak_bytes"] < ROOM_TO_KEEP * case.around.device_memory
    if case.option("train.activation_checkpointing") and room and backward > forward:
        why = (
            f"a step takes {profile.memory['peak_bytes'] / 1e9:.1f} GB of {case.around.device_memory / 1e9:.0f}: there "
            "is room to keep activations instead of computing them again"
        )
        cheaper = costs.scaled(backward=(backward - forward) / backward)
        yield case.advice({"train.activation_checkpointing": False}, why, cheaper)
    micro = case.option("train.micro_batch_size")
    if micro is not None and micro < profile.local_batch_size and _fits(case, profile.local_batch_size):
        why = (
            f"the whole batch fits into memory; in pieces of {micro} every image goes through the network twice before "
            "its backward pass"
        )
        effect = "batch norm's statistics become those of the whole batch"
        yield case.advice({"train.micro_batch_size": None}, why, costs.scaled(forward=0.5), effect)


def compilation(case: Case) -> Iterator[Advice]:
    """`torch.compile`, on a GPU."""
    if case.on_gpu and case.option("train.compile") == "off":
        why = "fused elementwise operations spare the GPU's memory; some minutes at the start"
        yield case.advice({"train.compile": "default"}, why, _network(case.costs, COMPILE_FACTOR))


def batch_size(case: Case) -> Iterator[Advice]:
    """A larger batch, over which what happens once a step is spread; the loss looks at all pairs."""
    profile, doubled = case.profile, 2 * case.profile.global_batch_size
    if doubled > profile.num_samples or not _fits(case, 2 * profile.local_batch_size):
        return
    micro = case.option("train.micro_batch_size")
    in_pieces = micro is not None and micro < profile.local_batch_size  # then batch norm talks in each of them
    names = ["optimizer"] if in_pieces else ["optimizer", "communication"]
    once = sum(case.costs.device.get(name, 0.0) for name in names)
    what = "the optimizer takes" if in_pieces else "optimizer and communication take"
    why = (
        f"{what} {once / case.costs.training:.0%} of the step, and happen{'s' * in_pieces} once for twice as many "
        "images; the loss compares each with all others"
    )
    effect = "another batch learns otherwise; `optim.lr_scaling` adapts the learning rate"
    cheaper = case.costs.scaled(**dict.fromkeys(names, 0.5), loss=2.0)
    yield case.advice({"data.global_batch_size": doubled}, why, cheaper, effect)


def zero_stage(case: Case) -> Iterator[Advice]:
    """The optimizer's work shared out among the ranks, or not."""
    ranks, stage = case.profile.world_size, case.option("train.zero_stage")
    if ranks == 1:
        return
    if stage == 0:
        why = f"each of {ranks} ranks then steps its share of the parameters, and gathers the others'"
        yield case.advice({"train.zero_stage": 1}, why, case.costs.scaled(optimizer=1 / ranks, communication=1.5))
    elif case.profile.memory["state_bytes"] * ranks < 0.2 * case.around.device_memory:
        why = "parameters, gradients and momentum fit whole on every rank, and need not be gathered in each step"
        yield case.advice({"train.zero_stage": 0}, why, case.costs.scaled(optimizer=ranks, communication=2 / 3))


def _network(costs: Costs, factor: float) -> Costs:
    return costs.scaled(forward=factor, backward=factor)


def _fits(case: Case, local_batch_size: int) -> bool:
    """Whether so many images of a rank fit into the device's memory at a time."""
    memory = case.profile.memory
    needed = memory["state_bytes"] + memory["activation_bytes_per_image"] * local_batch_size
    shared = case.profile.local_world_size if not case.on_gpu else 1  # ranks of a machine have one memory
    return needed * shared <= SHARE_OF_MEMORY * case.around.device_memory
