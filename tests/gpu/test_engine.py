"""Training steps through DeepSpeed on one GPU: every ZeRO stage, bf16, micro-batches, without waiting for it."""

import math

import pytest
import torch

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from train.cli import RunFailed
from train.engine import Engine, init_process_group
from train.optim.lars import LARS
from train.optim.param_groups import param_groups
from train.runtime import read_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BATCH_SIZE = 32
CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=18, width=0.5, stem="cifar"), projection_head=ProjectionHeadConfig(out_dim=64)
)


@pytest.fixture(scope="module")
def ranks():
    ranks = read_ranks()
    init_process_group(torch.device("cuda", 0))
    return ranks


def make(ranks, **options):
    method = build_method(CONFIG, seed=0)
    optimizer = LARS(param_groups(method, 1e-6))
    device = torch.device("cuda", 0)
    return Engine(
        method, optimizer, ranks=ranks, device=device, **{"precision": "fp32", "local_batch_size": BATCH_SIZE} | options
    )


def views(step):
    generator = torch.Generator().manual_seed(step)
    image, *noise = torch.randn(3, BATCH_SIZE, 3, 32, 32, generator=generator)
    return [(image + 0.5 * n).cuda().contiguous(memory_format=torch.channels_last) for n in noise]


def curve(engine, num_steps=5):
    return [engine.train_step(views(step), lr=0.1, step=step + 1)[0].item() for step in range(num_steps)]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_stages_agree(ranks, zero_stage):
    expected = curve(make(ranks, zero_stage=0))
    assert curve(make(ranks, zero_stage=zero_stage)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_bf16_steps_are_finite_and_learn(ranks, zero_stage, micro_batch_size):
    engine = make(ranks, zero_stage=zero_stage, precision="bf16", micro_batch_size=micro_batch_size)
    batch = views(0)
    losses = [engine.train_step(batch, lr=1.0, step=step)[0].item() for step in range(1, 21)]
    engine.check_finite()
    assert losses[-1] < losses[0]


def test_a_step_that_is_not_finite_moves_nothing_and_is_told_when_somebody_looks(ranks):
    engine = make(ranks)
    engine.train_step(views(0), lr=0.1, step=1)
    before = {name: value.clone() for name, value in engine._method.named_parameters()}
    broken = views(1)
    broken[0][0, 0, 0, 0] = math.nan
    for step in (2, 3):
        engine.train_step(broken if step == 2 else views(step), lr=0.1, step=step)
    assert all(torch.equal(value, before[name]) for name, value in engine._method.named_parameters())
    with pytest.raises(RunFailed, match=r"^step 2 is not finite: rank 0 had NaN in the projections"):
        engine.check_finite()


def test_a_step_does_not_wait_for_the_device(ranks):
    engine = make(ranks, precision="bf16")
    batches = [views(step) for step in range(6)]
    for step in range(5):  # compiles, fills allocators; DeepSpeed's timer would wait from the third step on
        engine.train_step(batches[step], lr=0.1, step=step + 1)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    engine.train_step(batches[5], lr=0.1, step=6)
    assert not torch.cuda.current_stream().query()
