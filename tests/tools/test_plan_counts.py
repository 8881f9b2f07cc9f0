"""What a step consists of, against torch's own counters on real networks, published sizes, and real collectives."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.build import build_method
from model.resnet import EncoderConfig
from tests.tools.plan_profiles import run_config
from tools.plan_counts import count
from tools.plan_memory import MemoryModel, state_bytes
from train.config import TrainConfig


class Collectives(TorchDispatchMode):
    """Numbers in each all-reduce."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.numbers.append(args[0][0].numel())
        return func(*args, **(kwargs or {}))


def with_encoder(run, **fields):
    return replace(run, model=replace(run.model, encoder=EncoderConfig(**fields)))


@pytest.mark.parametrize("size", [32, 48])
def test_operations_are_those_that_torch_counts_on_real_tensors(size):
    run = run_config(size=size)
    method = build_method(run.model, 0)
    views = [torch.randn(3, 3, size, size) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        torch.cat(method.project(views)).sum().backward()
    assert count(run).flops_per_image == counter.get_total_flops() / 3


def test_resnet50_has_its_published_size():
    """He et al. 2015, table 1: 3.8e9 multiply-adds, 4.1e9 with the stride on the 3×3; 25.6e6 parameters, fc 2.05e6."""
    counts = count(run_config(size=224, depth=50, width=1.0, stem="imagenet"))
    forward_and_backward = 3 * 2 * 4.09e9  # a backward is two forwards
    assert counts.flops_per_image == pytest.approx(2 * forward_and_backward, rel=0.02)
    head = 2048 * 2048 + 2 * 2048 + 2048 * 128 + 2 * 128
    assert counts.parameters == pytest.approx(23.5e6 + head, rel=0.002)
    assert counts.norm_layers == 53 + 2
    assert counts.out_dim == 128


def test_flops_grow_with_area_and_width_squared():
    run = run_config(size=64, depth=50, width=1.0, stem="imagenet")
    small, wide = count(run).flops_per_image, count(with_encoder(run, depth=50, width=2.0)).flops_per_image
    large = count(replace(run, augment=replace(run.augment, size=128))).flops_per_image
    assert large / small == pytest.approx(4, rel=0.03)  # the head does not grow
    assert wide / small == pytest.approx(4, rel=0.05)  # the first convolution reads three channels whatever the width


def test_activations_are_what_a_real_step_keeps():
    run = run_config(size=32)
    method, kept = build_method(run.model, 0), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        projections = method.project(views)
    assert projections
    assert count(run).activation_bytes_per_image == pytest.approx(sum(kept.values()) / 16, rel=0.01)


def test_half_precision_and_recomputation_keep_less():
    run = run_config(size=64, depth=50, width=0.5, stem="imagenet")
    full = count(run)
    half = count(replace(run, train=TrainConfig(precision="bf16")))
    assert half.activation_bytes_per_image == pytest.approx(full.activation_bytes_per_image / 2, rel=0.05)
    again = count(replace(run, train=TrainConfig(precision="fp32", activation_checkpointing=True)))
    assert again.activation_bytes_per_image < full.activation_bytes_per_image / 2
    assert 0 < again.recomputed_bytes_per_image < full.activation_bytes_per_image / 4
    assert again.flops_per_image == pytest.approx(full.flops_per_image * 4 / 3)


def test_batch_norms_all_reduces_are_those_of_a_real_step():
    """Of a process group that says yes to everything."""
    run = run_config()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        method = build_method(run.model, 0)
        with Collectives() as seen:
            projections = method.project([torch.randn(4, 3, 32, 32) for _ in range(2)])
            torch.cat(projections).sum().backward()
    finally:
        dist.destroy_process_group()
    counts = count(run)
    assert counts.small_all_reduces(passes=1, recomputed=False) == len(seen.numbers) + 1  # the one that looks for NaN
    forward = sum(number for number in seen.numbers if number % 2)  # 2C + 1 numbers; a backward's are 2C
    assert 4 * forward == counts.norm_bytes


@pytest.mark.parametrize(("stage", "ranks", "number"), [(0, 1, 12), (0, 8, 12), (1, 8, 9), (2, 8, 5.5), (2, 1, 16)])
def test_states_of_a_resnet50_by_stage(stage, ranks, number):
    """Bytes a parameter. Stage 0: 4 + 4 + 4. Stage 1: 4 + 4 + 8/8. Stage 2: 4 + 12/8."""
    assert state_bytes(27_968_704, stage, ranks) == number * 27_968_704


def model_of(stage=0, micro=None):
    return MemoryModel(
        counts=count(run_config()), zero_stage=stage, bf16=False, ema=False, micro_batch_size=micro, rest=1e6
    )


def test_the_peak_adds_up():
    model = model_of()
    counts, memory = model.counts, model.at(4, 16)
    assert memory.states == 12 * counts.parameters
    assert memory.reducing == 4 * counts.parameters
    rows = 3 * 4 * 2 * 128 * 64  # projections of both views of 64 images, three times
    assert memory.computing == counts.activation_bytes_per_image * 16 + rows
    assert memory.peak == memory.states + max(memory.computing, memory.reducing) + 1e6


@pytest.mark.parametrize("micro", [None, 8])
def test_the_largest_batch_fits_and_one_more_does_not(micro):
    model = model_of(micro=micro)
    limit = model.at(4, 100).peak + 1
    assert model.largest_local_batch(4, limit) == 100
    assert model.at(4, 101).peak > limit
    assert model.largest_local_batch(4, 1e6) == 0
