"""Steps through real DeepSpeed on real ranks: micro-batches, and steps that are not finite."""

import math

import pytest
import torch
import torch.distributed as dist

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from tests.train.slopes import make_engine as start_engine
from train.cli import RunFailed
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

pytestmark = pytest.mark.distributed

LOCAL_BATCH_SIZE = 6
STEPS = 3
CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    temperature=0.3,
    learn_temperature=True,
)


def method_and_engine(*, training, **options):
    """Running statistics (`training` False) make batch norm the same for every micro-batch."""
    method = build_method(CONFIG, seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    method.train(training)
    optimizer = LARS(param_groups(method, 1e-4), trust_coefficient=0.1)
    engine = start_engine(method, optimizer, local_batch_size=LOCAL_BATCH_SIZE, **options)
    method.train(training)
    return method, engine


def views_of(step):
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    image, *noise = torch.randn(3, LOCAL_BATCH_SIZE, 3, 8, 8, generator=generator)
    return [(image + 0.5 * n).contiguous(memory_format=torch.channels_last) for n in noise]


def state_of(method, engine):
    """Copies of everything that a step may change."""
    momentum = {f"{name}.momentum": slots["momentum"] for name, slots in engine.optimizer_state().items()}
    return {name: value.clone() for name, value in (dict(method.state_dict()) | momentum).items()}


def check_micro_batches(stage):
    """LARS divides by the gradient's norm, so a factor of it would not show: a plain step shows it as well."""
    for size in (2, 3):
        ends = []
        for micro_batch_size in (None, size):
            method, engine = method_and_engine(training=False, zero_stage=stage, micro_batch_size=micro_batch_size)
            for group in engine.optimizer.param_groups:
                group["adapt"] = False
            curve = []
            for step in range(STEPS):
                loss, metrics = engine.train_step(views_of(step), lr=0.02, step=step + 1)
                curve.append({"loss": loss, "temperature": metrics["temperature"]})
            ends.append((curve, state_of(method, engine)))
        (whole_curve, whole), (curve, ours) = ends
        torch.testing.assert_close(curve, whole_curve, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
        start = build_method(CONFIG, seed=3).contrastive_loss.log_temperature
        assert (ours["contrastive_loss.log_temperature"] - start).abs() > 1e-3, "what the loss itself learns, moves"


def check_skip(stage, micro_batch_size):
    """A step that is left out changes nothing: not the buffers, not the momentum, on no rank."""
    options = {"zero_stage": stage, "micro_batch_size": micro_batch_size, "on_nonfinite": "skip"}
    method, engine = method_and_engine(training=True, **options)
    engine.train_step(views_of(0), lr=0.2, step=1)
    before = state_of(method, engine)
    broken = views_of(1)
    if dist.get_rank() == 1:
        broken[1][2, 0, 3, 3] = math.nan
    engine.train_step(broken, lr=0.2, step=2)
    after = state_of(method, engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    engine.check_finite()
    loss, _ = engine.train_step(views_of(2), lr=0.2, step=3)
    assert loss.isfinite()
    changed = state_of(method, engine)
    assert not torch.equal(changed["encoder.conv1.weight"], before["encoder.conv1.weight"])
    assert all(value.isfinite().all() for value in changed.values())


def check_raise(stage):
    method, engine = method_and_engine(training=False, zero_stage=stage)  # batch norm would spread it to all ranks
    engine.train_step(views_of(0), lr=0.2, step=1)
    before = {name: parameter.clone() for name, parameter in method.named_parameters()}
    broken = views_of(1)
    if dist.get_rank() == 1:
        broken[0][0] = math.inf
    with pytest.raises(RunFailed, match=r"^step 2 is not finite: rank 1 had .* in the projections\. The optimizer"):
        engine.train_step(broken, lr=0.2, step=2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in method.named_parameters())


def check_everything(rank):
    for stage in (0, 1, 2):
        check_micro_batches(stage)
        check_skip(stage, None)
        check_skip(stage, 2)
        check_raise(stage)


def test_micro_batches_and_steps_that_are_not_finite():
    run_ranks(check_everything, 2)
