"""The moving average of weights against its formula in float64, alone and behind the real engine on two ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.ema import WeightAverage
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from tests.train.host_reads import HostReads
from tests.train.slopes import make_engine
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    learn_temperature=True,
)
COUNTER = "encoder.bn1.num_batches_tracked"
TEMPERATURE = "contrastive_loss.log_temperature"


class Formula:
    """a ← decay · a + (1 − decay) · w in float64."""

    def __init__(self, method, decay):
        self.decay = decay
        self.average = {name: value.double() for name, value in method.state_dict().items()}

    def update(self, method):
        for name, value in method.state_dict().items():
            self.average[name] = self.decay * self.average[name] + (1 - self.decay) * value.double()

    def check(self, average, rtol=1e-5, atol=1e-6):
        """Each of the steps rounds by 2⁻²⁴ of the average, and the next ones forget it like a weight."""
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), self.average[name], rtol=rtol, atol=atol, msg=name)


@torch.no_grad()
def wander(method, step):
    """What an optimizer's step and a forward pass might do to a method's state."""
    generator = torch.Generator().manual_seed(step)
    for value in method.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
        else:
            value.add_(1)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def copies(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("skip", [None, False])
def test_many_steps_are_the_formula_s(decay, skip):
    method = build_method(CONFIG, seed=1)
    average, formula = WeightAverage(method, decay), Formula(method, decay)
    for step in range(300):
        wander(method, step)
        average.update(None if skip is None else torch.tensor(skip))
        formula.update(method)
    formula.check(average)
    state = average.state_dict()
    assert state.keys() == method.state_dict().keys()
    assert state[COUNTER] == 300, "what counts is the method's own"
    build_method(CONFIG, seed=2).load_state_dict(state)  # strict


def test_it_begins_as_the_weights_and_never_shares_their_memory():
    method = build_method(CONFIG, seed=1)
    average = WeightAverage(method, 0.9)
    before = copies(method.state_dict())
    wander(method, 0)
    state = average.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.items() if value.is_floating_point())


def test_a_step_that_was_left_out_does_not_move_it():
    method = build_method(CONFIG, seed=1)
    average, plain = WeightAverage(method, 0.9), WeightAverage(method, 0.9)
    for step in range(3):
        wander(method, step)
        average.update(torch.tensor(False))
        plain.update()
    assert same(average.state_dict(), plain.state_dict())
    before = copies(average.state_dict())
    with torch.no_grad():
        method.encoder.conv1.weight.add_(1.0)
    average.update(torch.tensor(True))
    assert same(average.state_dict(), before)


def test_a_resumed_average_goes_on_bit_for_bit():
    method = build_method(CONFIG, seed=1)
    average = WeightAverage(method, 0.99)
    for step in range(3):
        wander(method, step)
        average.update()
    other = build_method(CONFIG, seed=2)
    other.load_state_dict(copies(method.state_dict()))
    resumed = WeightAverage(other, 0.99)
    resumed.load_state_dict(copies(average.state_dict()))
    for step in range(3, 6):
        for each, its_average in ((method, average), (other, resumed)):
            wander(each, step)
            its_average.update(torch.tensor(False))
    assert same(average.state_dict(), resumed.state_dict())


def test_a_method_may_be_moved_and_its_average_is_at_least_float32():
    method = build_method(CONFIG, seed=1).bfloat16()
    average, formula = WeightAverage(method, 0.9), Formula(method, 0.9)
    method.to(memory_format=torch.channels_last)
    for step in range(20):
        wander(method, step)
        average.update()
        formula.update(method)
    formula.check(average)
    assert {value.dtype for value in average.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert WeightAverage(method.double(), 0.9).state_dict()["encoder.bn1.weight"].dtype == torch.float64


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"^`train.ema_decay` must be in \[0, 1\), got "):
        WeightAverage(torch.nn.Linear(1, 1), decay)


def test_another_method_s_average_is_refused_and_changes_nothing():
    average = WeightAverage(build_method(CONFIG, seed=1), 0.9)
    before = copies(average.state_dict())
    strange = copies(before)
    del strange[TEMPERATURE]
    with pytest.raises(ValueError, match=rf"got {len(strange)}; `{TEMPERATURE}` is only in one of them: resume with"):
        average.load_state_dict(strange)
    strange = copies(before) | {TEMPERATURE: torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"`{TEMPERATURE}` must have shape \[1\], got \[2\]; resume with"):
        average.load_state_dict(strange)
    assert same(average.state_dict(), before)


@pytest.mark.parametrize("skip", [None, True, False])
def test_an_update_reads_nothing_on_the_host(skip):
    method = build_method(CONFIG, seed=1)
    average = WeightAverage(method, 0.9)
    flag = None if skip is None else torch.tensor(skip)
    with HostReads() as reads:
        average.update(flag)
    assert reads.found == set()
    with HostReads() as reads:
        bool(torch.tensor(True))
    assert reads.found, "a read is seen"


@pytest.mark.distributed
def test_behind_the_engine_on_two_ranks():
    run_ranks(check_engine, 2)


def check_engine(rank):
    """With activations that are recomputed, the same bits come out, in the average too; on both ranks."""
    for options in (
        {"zero_stage": 0, "micro_batch_size": 2},
        {"zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 2, "precision": "bf16", "micro_batch_size": 2},
    ):
        average, weights = follow(rank, options, checkpointed=False)
        again, same_weights = follow(rank, options, checkpointed=True)
        assert same(average, again)
        assert same(weights, same_weights)
        for value in average.values():
            both = value.clone()
            dist.broadcast(both, 0)
            assert torch.equal(both, value)


def follow(rank, options, *, checkpointed):
    """The average follows what the engine does to the weights; a step that it leaves out moves neither."""
    method = build_method(CONFIG, seed=3)
    if checkpointed:
        checkpoint_activations(method.encoder)
    optimizer = LARS(param_groups(method, 1e-4), trust_coefficient=0.1)
    engine = make_engine(method, optimizer, local_batch_size=4, on_nonfinite="skip", **options)
    average, formula = WeightAverage(method, 0.8), Formula(method, 0.8)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        views = list(torch.randn(2, 4, 3, 8, 8, generator=generator))
        if step == 2:
            views[rank][0, 0, 0, 0] = math.nan
        before, weights = copies(average.state_dict()), copies(method.state_dict())
        engine.train_step(views, lr=0.5, step=step + 1)
        average.update(engine.left_out)
        if step == 2:
            assert same(before, average.state_dict())
            assert same(weights, method.state_dict())
        else:
            formula.update(method)
            assert not torch.equal(before[TEMPERATURE], average.state_dict()[TEMPERATURE])
            assert not torch.equal(weights["encoder.conv1.weight"], method.encoder.conv1.weight)
    formula.check(average)
    return copies(average.state_dict()), copies(method.state_dict())
