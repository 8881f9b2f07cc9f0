"""The engine keeps DeepSpeed from what it does unasked: seen on two real ranks, at every ZeRO stage."""

import logging.handlers

import pytest
import torch
import torch.distributed as dist

import train.engine
from tests.distributed.ranks import run_ranks
from tests.train.slopes import (
    LARSFormula,
    Slopes,
    copy_of,
    distance,
    make_engine,
    mean_slopes,
    motion,
    slopes,
    take_steps,
)
from train.cli import RunFailed
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

pytestmark = pytest.mark.distributed

PLAIN_LR = 0.5
HUGE = 1e6


class Watched(Slopes):
    """Remembers whether it ran under autocast."""

    autocast = None

    def project(self, views):
        self.autocast = torch.is_autocast_enabled("cpu")
        return super().project(views)


class Cliff(Slopes):
    """A finite loss whose gradient is NaN where the parameter is 0."""

    def loss(self, projections, labels=None):
        loss, metrics = super().loss(projections, labels)
        return loss + self.zeros.weight.abs().sqrt().sum(), metrics


def lars(method):
    return LARS(param_groups(method, 1e-2), momentum=0.9, trust_coefficient=1e-3, backend="reference")


def check_construction(stage, precision):
    """No step is taken; the weights are in the layout that DeepSpeed bears; autocast leaves them in float32."""
    method = Watched().to(memory_format=torch.channels_last)
    before = copy_of(method.state_dict())
    optimizer = lars(method)
    engine = make_engine(method, optimizer, zero_stage=stage, precision=precision)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert engine.optimizer_state() == {}
    assert not optimizer.state
    weight = method.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last if stage == 0 else torch.contiguous_format)
    take_steps(engine, [0])
    assert method.autocast == (precision == "bf16")
    assert {parameter.dtype for parameter in method.parameters()} == {torch.float32}


def some_steps(stage, precision="fp32"):
    method = Slopes()
    take_steps(make_engine(method, lars(method), zero_stage=stage, precision=precision), range(3))
    return copy_of(dict(method.named_parameters()))


def check_gradients_are_averaged_in_float32(stage, precision):
    """Also under autocast, where DeepSpeed's ZeRO would average those of Linear and Conv2d in bfloat16."""
    formula = LARSFormula(Slopes())
    for step in range(3):
        formula.step(mean_slopes(step, dist.get_world_size()))
    assert distance(motion(some_steps(stage, precision), Slopes()), motion(formula.parameters, Slopes())) < 1e-6


def check_a_parameter_larger_than_a_bucket(stage):
    """The convolution does not fit into one of 40, and no two matrices share one."""
    expected = some_steps(stage)
    whole, train.engine.BUCKET_ELEMENTS = train.engine.BUCKET_ELEMENTS, 40
    try:
        found = some_steps(stage)
    finally:
        train.engine.BUCKET_ELEMENTS = whole
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def plain_step(stage, scale, *, clipping=0.0, method=None):
    """One step p ← p − PLAIN_LR · g, g alike on all ranks: the parameters before, g, and the parameters after it."""
    method = method or Slopes()
    names, params = zip(*method.named_parameters(), strict=True)
    group = {"params": list(params), "param_names": list(names), "weight_decay": 0.0, "adapt": False}
    optimizer = LARS([group], momentum=0.0, backend="reference")
    engine = make_engine(method, optimizer, zero_stage=stage, gradient_clipping=clipping)
    row = slopes(0, 0, 1) * scale
    before = torch.cat([parameter.detach().flatten() for parameter in params])
    engine.train_step([row], lr=PLAIN_LR, step=1)
    return before, row[0], torch.cat([parameter.detach().flatten() for parameter in params])


def check_a_gradient_moves_the_weights_by_all_of_it(stage):
    """However large, where clipping was not asked for; and below the limit, where it was."""
    for scale, clipping in ((HUGE, 0.0), (1e-2, 3.0)):
        before, gradient, after = plain_step(stage, scale, clipping=clipping)
        assert torch.equal(after, before - PLAIN_LR * gradient)


def check_clipping_scales_the_whole_gradient_to_the_limit(stage):
    before, gradient, after = plain_step(stage, HUGE, clipping=3.0)
    gradient = gradient.double()
    torch.testing.assert_close(
        after.double(), before.double() - PLAIN_LR * 3.0 * gradient / gradient.norm(), rtol=1e-6, atol=1e-6
    )


def check_a_gradient_that_is_not_a_number_is_not_passed_over(stage, clipping):
    """Behind a finite loss. DeepSpeed's ZeRO leaves such a step out, without a word, wherever it knows the norm."""
    method = Cliff()
    engine = make_engine(method, lars(method), zero_stage=stage, gradient_clipping=clipping)
    before = copy_of(method.state_dict())
    with pytest.raises(RunFailed, match=r"^step 1 is not finite: losses are finite, the gradient is not"):
        take_steps(engine, [0])
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def check_nothing_is_compiled(extensions):
    """DeepSpeed would build a library of shared-memory collectives, for half a minute, before the first step."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    assert list(extensions.rglob("*")) == []
    assert OpBuilder._loaded_ops == {}


def check_nothing_waits_for_the_device(stage):
    """DeepSpeed's throughput timer would, twice a step from the third one on."""
    from deepspeed.accelerator import get_accelerator

    method = Slopes()
    engine = make_engine(method, lars(method), zero_stage=stage)
    accelerator = get_accelerator()
    waits = []
    accelerator.synchronize = lambda *_: waits.append(1)
    take_steps(engine, range(5))
    del accelerator.synchronize
    assert not waits


def check_deepspeed_is_quiet(stage):
    """No word of caution at an optimizer that is not its own."""
    from deepspeed.utils import logger

    records = logging.handlers.BufferingHandler(1000)
    logger.addHandler(records)
    some_steps(stage)
    logger.removeHandler(records)
    assert [record.getMessage() for record in records.buffer] == []


def check_everything(rank, extensions):
    for stage in (0, 1, 2):
        for precision in ("fp32", "bf16"):
            check_construction(stage, precision)
            check_gradients_are_averaged_in_float32(stage, precision)
        check_a_parameter_larger_than_a_bucket(stage)
        check_a_gradient_moves_the_weights_by_all_of_it(stage)
        check_clipping_scales_the_whole_gradient_to_the_limit(stage)
        check_a_gradient_that_is_not_a_number_is_not_passed_over(stage, 0.0)
        check_a_gradient_that_is_not_a_number_is_not_passed_over(stage, 1.0)
        check_nothing_waits_for_the_device(stage)
        check_deepspeed_is_quiet(stage)
    check_nothing_is_compiled(extensions)


def test_deepspeed_does_nothing_that_it_was_not_asked_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_ranks(check_everything, 2, tmp_path, timeout_s=240)
