"""LARS as an optimizer: groups, rates, layouts, what is left alone; its configuration and the scaling of its rate."""

import copy
import itertools
import math

import pytest
import torch

from tests.train.test_lars_forms import TRACES
from train.optim.lars import LARS, LARSConfig, peak_lr
from train.optim.lars_reference import lars_step
from train.optim.stretches import FORMS

EXACT = {"rtol": 0, "atol": 1e-14}  # float64 on numbers of order 1


def worked_trace():
    return TRACES["classic", False]


def worked_plain_trace():
    """The same rates on p = 3 without decay and adaptation: v = 0.5 v + lr g, p = p − v."""
    return [(1.0, 0.2, 0.2, 2.8), (0.5, 0.4, 0.3, 2.5), (2.0, -0.1, -0.05, 2.55)]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_hand_worked_trace():
    adapted = torch.nn.Parameter(double([[3.0, 4.0]]))
    plain = torch.nn.Parameter(double([3.0]))
    groups = [{"params": [adapted]}, {"params": [plain], "weight_decay": 0.0, "adapt": False}]
    optimizer = LARS(groups, momentum=0.5, weight_decay=0.5, trust_coefficient=0.1)
    for (lr, grad, v, p), (_, plain_grad, plain_v, plain_p) in zip(worked_trace(), worked_plain_trace(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        adapted.grad, plain.grad = double([grad]), double([plain_grad])
        optimizer.step()
        torch.testing.assert_close(optimizer.state[adapted]["momentum"], double([v]), **EXACT)
        torch.testing.assert_close(adapted.data, double([p]), **EXACT)
        torch.testing.assert_close(optimizer.state[plain]["momentum"], double([plain_v]), **EXACT)
        torch.testing.assert_close(plain.data, double([plain_p]), **EXACT)


def test_the_learning_rate_is_inside_the_momentum():
    """The outer form (v = m v + r g, p = p − lr v) would rescale the kept momentum as well when lr changes.

    In step 2 of the trace it moves p by 0.5 · (0.5 · (0.3, 0.4) + 0.09 · (3, 4)) = (0.21, 0.28), which is
    less than the classic form's (0.285, 0.38) by (1 − 0.5) · m · (0.3, 0.4).
    """
    param = torch.nn.Parameter(double([3.0, 4.0]))
    optimizer = LARS([param], momentum=0.5, weight_decay=0.5, trust_coefficient=0.1)
    for lr, grad, _, _ in worked_trace()[:2]:
        optimizer.param_groups[0]["lr"] = lr
        before = param.detach().clone()
        param.grad = double(grad)
        optimizer.step()
    outer_update = double([0.21, 0.28])
    torch.testing.assert_close((before - param.data) - outer_update, double([0.075, 0.1]), **EXACT)


@pytest.mark.parametrize("shape", [(41, 3, 7, 7), (1271, 41), (401,), (1, 1), ()])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_random_tensors_against_the_reference(shape, dtype, rtol, form, nesterov, adapt):
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    param = torch.nn.Parameter(start.to(dtype))
    options = {"momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-2}
    chosen = {"form": form, "nesterov": nesterov}
    optimizer = LARS([{"params": [param], "adapt": adapt}], **options, **chosen)
    expected, buffer = param.detach().double().clone(), torch.zeros(shape, dtype=torch.float64)
    for lr in (0.7, 0.1, 1.3):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.param_groups[0]["lr"] = lr
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad), "a step must leave the gradient as it is"
        expected, buffer = lars_step(expected, grad.double(), buffer, lr=lr, adapt=adapt, **options, **chosen)
    torch.testing.assert_close(param.data.double(), expected, rtol=rtol, atol=rtol)


def test_sixteen_bit_parameters_are_computed_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(6)
    start, grad = (torch.randn(401, 7, generator=generator).bfloat16() for _ in range(2))
    param = torch.nn.Parameter(start.clone())
    param.grad = grad.clone()
    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.1}
    optimizer = LARS([param], **options)
    optimizer.step()
    expected, buffer = lars_step(start.double(), grad.double(), torch.zeros(401, 7).double(), adapt=True, **options)
    half_an_ulp = {"rtol": 2**-8 * 1.001, "atol": 1e-6}
    torch.testing.assert_close(param.data.double(), expected, **half_an_ulp)
    torch.testing.assert_close(optimizer.state[param]["momentum"].double(), buffer, **half_an_ulp)


def test_channels_last_weights_keep_their_layout_and_values():
    start, grad = torch.randn(8, 5, 3, 3), torch.randn(8, 5, 3, 3)
    results = []
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout, grad_layout in itertools.product(layouts, layouts):
        param = torch.nn.Parameter(start.clone().to(memory_format=layout))
        param.grad = grad.clone().to(memory_format=grad_layout)
        optimizer = LARS([param], lr=1.0)
        optimizer.step()
        assert optimizer.state[param]["momentum"].stride() == param.stride()
        results.append(param.data)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


def test_a_parameter_that_takes_another_layout_keeps_its_momentum():
    start, grads = torch.randn(8, 5, 3, 3), torch.randn(2, 8, 5, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(start.clone())
        optimizer = LARS([param], lr=1.0, trust_coefficient=0.5)
        for grad in grads:
            param.grad = grad.clone().contiguous(memory_format=layout)
            optimizer.step()
            param.grad = None
            param.data = param.data.to(memory_format=layout)
        results.append(param.data)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:, 1:].T])
def test_parameters_that_are_not_contiguous(view):
    """Transposed, with gaps, and both."""
    memory, grad = torch.randn(6, 8), torch.randn(6, 8)
    param = torch.nn.Parameter(view(memory))
    param.grad = view(grad).clone()
    before, kept = param.detach().clone(), memory.clone()
    LARS([param], lr=1.0, trust_coefficient=0.5, weight_decay=0.0).step()
    view(kept).copy_(before - 0.5 * before.norm() / param.grad.norm() * param.grad)
    torch.testing.assert_close(memory, kept, rtol=0, atol=1e-6)


def test_sparse_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ValueError, match=r"LARS needs dense gradients, got torch.sparse_coo"):
        LARS([param], lr=1.0).step()


@pytest.mark.parametrize(
    ("param", "grad", "weight_decay", "expected"),
    [
        # ‖p‖ = 0: r = 1, so p = 0 − 2 · (3, 4)
        ([0.0, 0.0], [3.0, 4.0], 0.5, [-6.0, -8.0]),
        # ‖g‖ = 0: r = 1, and the update is 0
        ([3.0, 4.0], [0.0, 0.0], 0.0, [3.0, 4.0]),
        # the decay cancels the gradient, which then has norm 0
        ([3.0, 4.0], [-1.5, -2.0], 0.5, [3.0, 4.0]),
        # the gradient alone has norm 0, and the decay acts: g = (1.5, 2), r = 0.001 · 5 / 2.5
        ([3.0, 4.0], [0.0, 0.0], 0.5, [3.0 - 2 * 0.002 * 1.5, 4.0 - 2 * 0.002 * 2.0]),
    ],
)
def test_zero_norms(param, grad, weight_decay, expected):
    param = torch.nn.Parameter(double(param))
    param.grad = double(grad)
    LARS([param], lr=2.0, weight_decay=weight_decay).step()
    torch.testing.assert_close(param.data, double(expected), **EXACT)


def test_parameters_without_gradient_are_left_alone():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = LARS([used, unused], lr=1.0)
    optimizer.step()
    assert torch.equal(unused.data, torch.ones(2))
    assert unused not in optimizer.state
    assert not torch.equal(used.data, torch.ones(2))


def test_a_restored_optimizer_goes_on_bit_for_bit():
    grads = torch.randn(6, 30, 20, generator=torch.Generator().manual_seed(1))
    start = torch.randn(30, 20, generator=torch.Generator().manual_seed(2))

    def steps(param, optimizer, which):
        for i in which:
            optimizer.param_groups[0]["lr"] = 0.1 * (i + 1)
            param.grad = grads[i].clone()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    steps(whole, LARS([whole]), range(6))

    first = torch.nn.Parameter(start.clone())
    first_optimizer = LARS([first])
    steps(first, first_optimizer, range(3))
    second = torch.nn.Parameter(first.detach().clone())
    second_optimizer = LARS([second])
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    steps(second, second_optimizer, range(3, 6))
    assert torch.equal(whole, second)


def test_a_step_reads_nothing_back_from_the_device():
    """A tensor on `meta` has no values, so any decision that needs one raises."""
    param = torch.nn.Parameter(torch.empty(3, 4, device="meta"))
    param.grad = torch.empty(3, 4, device="meta")
    LARS([param], lr=1.0).step()


@pytest.mark.gpu
def test_the_trace_on_a_gpu():
    """In float64, which the reference computes."""
    param = torch.nn.Parameter(double([3.0, 4.0]).cuda())
    optimizer = LARS([param], momentum=0.5, weight_decay=0.5, trust_coefficient=0.1)
    for lr, grad, _, p in worked_trace():
        optimizer.param_groups[0]["lr"] = lr
        param.grad = double(grad).cuda()
        optimizer.step()
        torch.testing.assert_close(param.data.cpu(), double(p), **EXACT)


def test_the_peak_rate_scales_as_published():
    # SimCLR v1: 4.8 at batch 4096, which both rules give with their published base rates (appendix B.1).
    assert math.isclose(peak_lr(LARSConfig(), 4096), 4.8, rel_tol=1e-15)
    assert math.isclose(peak_lr(LARSConfig(base_lr=0.075, lr_scaling="sqrt"), 4096), 4.8, rel_tol=1e-15)
    assert math.isclose(peak_lr(LARSConfig(), 256), 0.3, rel_tol=1e-15)
    assert math.isclose(peak_lr(LARSConfig(base_lr=0.075, lr_scaling="sqrt"), 256), 1.2, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_lr", -0.1),
        ("base_lr", math.nan),
        ("momentum", 1.0),
        ("weight_decay", -1e-6),
        ("trust_coefficient", 0.0),
    ],
)
def test_a_wrong_hyperparameter_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^`optim\.{field}` must be .*got {value}"):
        LARSConfig(**{field: value})


@pytest.mark.parametrize("field", ["lr_scaling", "form", "backend"])
def test_an_unknown_choice_is_named(field):
    with pytest.raises(ValueError, match=rf"^`optim\.{field}` must be one of .*, got other$"):
        LARSConfig(**{field: "other"})


def test_a_copy_of_the_optimizer_steps_like_it():
    param = torch.nn.Parameter(torch.randn(30, 20))
    optimizer = LARS([param], lr=1.0, form="larc", nesterov=True, backend="reference")
    param.grad = torch.randn(30, 20)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    (same,) = copied.param_groups[0]["params"]
    same.grad = param.grad.clone()
    optimizer.step()
    copied.step()
    assert torch.equal(same, param)
    assert copied.defaults["backend"] == "reference"


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match=r"^`optim\.nesterov` must be false where `optim\.momentum` is 0, got true$"):
        LARSConfig(nesterov=True, momentum=0.0)
