"""A loss as a module: which one it computes, what it learns, and which options it refuses."""

import math

import pytest
import torch

from model.losses.contrastive import LEARNED_RANGE, ContrastiveLoss
from model.losses.margin_triplet import margin_triplet
from model.losses.nt_logistic import nt_logistic
from model.losses.reference import nt_logistic_reference
from model.ntxent.loss import nt_xent
from model.ntxent.reference import nt_xent_reference
from tests.model.test_ntxent import gradients, projections


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("options", "function", "its_options"),
    [
        ({}, nt_xent, {"temperature": 0.1}),
        ({"name": "nt_xent", "temperature": 0.5}, nt_xent, {"temperature": 0.5}),
        ({"name": "nt_logistic", "temperature": 0.5}, nt_logistic, {"temperature": 0.5}),
        ({"name": "nt_logistic", "semi_hard": True}, nt_logistic, {"temperature": 0.1, "semi_hard": True}),
        ({"name": "margin_triplet", "margin": 0.8}, margin_triplet, {"margin": 0.8}),
        ({"name": "margin_triplet", "semi_hard": True}, margin_triplet, {"margin": 0.4, "semi_hard": True}),
    ],
)
def test_it_computes_the_loss_of_its_name(options, function, its_options, normalize):
    module = ContrastiveLoss(**options, normalize=normalize)
    z1, z2 = projections(9, 4)
    loss, metrics = module(z1, z2)
    expected = function(z1, z2, **its_options, normalize=normalize)
    assert torch.equal(loss, expected.loss)
    assert metrics == {"contrastive_accuracy": expected.contrastive_accuracy}
    assert all(map(torch.equal, gradients(loss, z1, z2), gradients(expected.loss, z1, z2)))
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("name", ["nt_xent", "nt_logistic"])
def test_a_learned_temperature_is_one_number_with_the_formulas_gradient(name):
    module = ContrastiveLoss(name=name, temperature=0.3, learn_temperature=True).double()
    ((parameter_name, parameter),) = module.named_parameters()
    assert parameter_name == "log_temperature"
    assert parameter.shape == (1,)
    z1, z2 = projections(9, 4)
    loss, metrics = module(z1, z2)
    log_temperature = parameter.detach().clone().requires_grad_()
    options = {"temperature": log_temperature.exp(), "normalize": True}
    expected, _ = (
        nt_xent_reference(z1, z2, **options)
        if name == "nt_xent"
        else nt_logistic_reference(z1, z2, **options, semi_hard=False)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # log τ passes through fp32
    ours, theirs = gradients(loss, z1, z2, parameter), gradients(expected, z1, z2, log_temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert metrics["temperature"].item() == pytest.approx(0.3)
    assert not metrics["temperature"].requires_grad


@pytest.mark.parametrize(("beyond", "bound"), [(-9.0, LEARNED_RANGE[0]), (9.0, LEARNED_RANGE[1])])
@pytest.mark.parametrize("upstream", [1.0, -1.0])
def test_a_learned_temperature_stays_in_its_range_and_comes_back(beyond, bound, upstream):
    module = ContrastiveLoss(learn_temperature=True)
    module.log_temperature.data.fill_(beyond)
    z1, z2 = projections(9, 4, torch.float32)
    loss, metrics = module(z1, z2)
    assert metrics["temperature"].item() == pytest.approx(bound)
    temperature = torch.tensor(bound, requires_grad=True)
    expected = nt_xent(z1, z2, temperature=temperature).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (ours,) = gradients(loss, module.log_temperature, upstream=upstream)
    (theirs,) = gradients(expected, temperature, upstream=upstream)
    leads_out = beyond * theirs < 0  # a step goes against the gradient
    expected_gradient = 0 * theirs if leads_out else bound * theirs  # dL/dlog τ = τ·dL/dτ
    torch.testing.assert_close(ours[0], expected_gradient, rtol=1e-4, atol=0)


def test_gradient_descent_finds_the_best_temperature():
    z1, z2 = (z.detach() for z in projections(41, 16, torch.float32))
    module = ContrastiveLoss(temperature=0.05, learn_temperature=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        module(z1, z2)[0].backward()
        optimizer.step()
    best = min((nt_xent(z1, z2, temperature=t / 1000).loss.item(), t / 1000) for t in range(50, 1000))[1]
    assert module(z1, z2)[1]["temperature"].item() == pytest.approx(best, abs=1.5e-3)


def test_it_survives_its_state_dict_and_low_precision():
    module = ContrastiveLoss(temperature=0.25, learn_temperature=True)
    other = ContrastiveLoss(temperature=0.5, learn_temperature=True)
    other.load_state_dict(module.state_dict())
    assert other.temperature().item() == pytest.approx(0.25)
    z1, z2 = projections(9, 4, torch.bfloat16)
    loss, metrics = module.bfloat16()(z1, z2)
    assert loss.dtype == metrics["temperature"].dtype == torch.float32
    assert gradients(loss, module.log_temperature)[0].dtype == torch.bfloat16
    assert repr(module) == "ContrastiveLoss(nt_xent, normalize=True, semi_hard=False, exchange=all_gather)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "triplet"}, "`model.loss` must be 'nt_xent', 'nt_logistic' or 'margin_triplet', got 'triplet'"),
        ({"temperature": 0.0}, "`model.temperature` must be a finite number > 0, got 0.0; try 0.1"),
        ({"temperature": math.inf}, "`model.temperature` must be a finite number > 0, got inf"),
        (
            {"temperature": 0.005, "learn_temperature": True},
            r"`model.temperature` must be in \[0.01, 100\]",
        ),
        ({"name": "margin_triplet", "learn_temperature": True}, "`model.learn_temperature` needs a loss with a temp"),
        ({"semi_hard": True}, "`model.semi_hard` is for 'nt_logistic' and 'margin_triplet', got 'nt_xent', which"),
        ({"name": "nt_logistic", "margin": 0.4}, "`model.margin` is for 'margin_triplet', got 0.4 with 'nt_logistic'"),
        ({"name": "margin_triplet", "margin": -1.0}, "`model.margin` must be a finite number ≥ 0, got -1.0"),
        ({"exchange": "star"}, "`model.exchange` must be 'all_gather' or 'ring', got 'star'"),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ContrastiveLoss(**options)
    assert "\n" not in str(error.value)
