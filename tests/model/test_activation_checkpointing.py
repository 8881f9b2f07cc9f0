"""Recomputed activations: the same bits as kept ones, statistics once, less memory; alone and on two ranks."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from train.gradient_cache import Cotangents, cached_projections, loss_gradients, micro_batches, surrogate

NUM_IMAGES = 6
EXACT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # freed memory goes back at once
SELECTIVE = {"depth": 50, "selective_kernel": True}
ENCODERS = {"basic": {"depth": 10}, "bottleneck": {"depth": 50}, "selective kernel": SELECTIVE}


def make(checkpointed, *, encoder=ENCODERS["basic"]):
    """Every γ away from the 0 that would close the blocks."""
    config = ModelConfig(
        encoder=EncoderConfig(**{"width": 0.125, "stem": "cifar", **encoder}),
        projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    )
    method = build_method(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    if checkpointed:
        checkpoint_activations(method.encoder)
    return method.to(memory_format=torch.channels_last)


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, *noise = torch.randn(3, NUM_IMAGES, 3, 8, 8, generator=generator)
    return [(image + 0.5 * n).contiguous(memory_format=torch.channels_last) for n in noise]


def steps(method, rank=0, *, precision="fp32"):
    """Losses, gradients and buffers of two passes."""
    losses = []
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = method(views(10 * rank + seed))
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return {"losses": torch.stack(losses)} | gradients | dict(method.named_buffers())


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_loss_gradients_and_statistics_are_those_without(encoder, precision):
    kept, recomputed = (
        steps(make(checkpointed, encoder=encoder), precision=precision) for checkpointed in (False, True)
    )
    assert_same(recomputed, kept)
    assert recomputed["encoder.layer4.0.bn1.num_batches_tracked"] == 2


def test_blocks_run_twice_with_gradients_and_once_without():
    method = make(True)
    runs = []
    method.encoder.layer2[0].conv1.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss, _ = method(views())
    assert runs == [True]
    loss.backward()
    assert runs == [True, True]
    runs.clear()
    with torch.no_grad():
        method(views())
    assert runs == [False]


def test_names_and_hooks_stay_and_a_copy_stands_by_itself():
    plain, method = make(False), make(True)
    assert method.state_dict().keys() == plain.state_dict().keys()
    method.load_state_dict(plain.state_dict())
    outputs = []
    method.encoder.layer1[0].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    copied = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied.encoder(views()[0]).abs().max() == 0, "a copy's blocks are its own"
    method(views())
    assert len(outputs) == 1 + 1, "the copy's hook, and the original's"


def test_together_with_micro_batches():
    results = []
    for checkpointed in (False, True):
        method = make(checkpointed)
        cached = loss_gradients(method, cached_projections(method, views(), 3))
        by_piece = zip(*(torch.split(gradient, 3) for gradient in cached.by_projection), strict=True)
        for piece, gradients in zip(micro_batches(views(), 3), by_piece, strict=True):
            surrogate(method, method.project(piece), Cotangents(list(gradients), {})).backward()
        gradients = {name: parameter.grad for name, parameter in method.encoder.named_parameters()}
        results.append({"loss": cached.loss} | gradients | dict(method.named_buffers()))
    assert_same(results[1], results[0])


PEAK = """
import torch
from model.resnet import EncoderConfig, ResNet
from model.activation_checkpointing import checkpoint_activations

def peak_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024

torch.set_num_threads(1)
encoder = ResNet(EncoderConfig(depth=50, width=0.5)).to(memory_format=torch.channels_last)
x = torch.randn(32, 3, 96, 96).contiguous(memory_format=torch.channels_last)
encoder(x[:2]).sum().backward()  # what libraries allocate once
before = peak_mib()
checkpoint_activations(encoder)
encoder(x).square().sum().backward()
print(peak_mib() - before)
for block in encoder.modules():
    block.__dict__.pop("forward", None)
encoder(x).square().sum().backward()
print(peak_mib() - before)
"""


def test_the_peak_of_memory_is_lower():
    child = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True, env=EXACT)
    recomputed, kept = map(float, child.stdout.split())
    print(f"ResNet-50 of width 1/2 on 32 images of 96²: {kept:.0f} MiB, recomputed {recomputed:.0f} MiB")
    assert 0 < recomputed < 0.75 * kept  # a block's inside, all inputs of blocks, and the stem stay


@pytest.mark.distributed
def test_on_two_ranks_the_collectives_keep_their_order():
    """Batch norm's run again in the backward, between its own; behind the engine: see tests/model/test_ema.py."""
    run_ranks(check_ranks, 2)


def check_ranks(rank):
    assert dist.get_world_size() == 2
    for encoder in (ENCODERS["basic"], SELECTIVE):
        kept, recomputed = (steps(make(checkpointed, encoder=encoder), rank) for checkpointed in (False, True))
        assert_same(recomputed, kept)
