"""LARS against hand-worked numbers and against its reference, and the scaling of its peak rate."""

import math

import pytest
import torch

from train.optim.lars import LARS, LARSConfig, peak_lr
from train.optim.lars_reference import lars_step

EXACT = {"rtol": 0, "atol": 1e-14}  # float64 on numbers of order 1


def worked_trace():
    """Three steps by hand, with m = 0.5, λ = 0.5, η = 0.1, p = (3, 4): lr, raw gradient, v and p after it.

    1. lr 1:   g + λp = (-0.9, -1.2) + (1.5, 2) = (0.6, 0.8), norm 1; ‖p‖ = 5; r = 0.1 · 5 / 1 = 0.5
               v = 1 · 0.5 · (0.6, 0.8) = (0.3, 0.4);  p = (2.7, 3.6)
    2. lr 0.5: g + λp = (1.65, 2.2) + (1.35, 1.8) = (3, 4), norm 5; ‖p‖ = 4.5; r = 0.1 · 4.5 / 5 = 0.09
               v = 0.5 · (0.3, 0.4) + 0.5 · 0.09 · (3, 4) = (0.285, 0.38);  p = (2.415, 3.22)
    3. lr 2:   g + λp = (-2.0075, -1.01) + (1.2075, 1.61) = (-0.8, 0.6), norm 1; ‖p‖ = 4.025; r = 0.4025
               v = 0.5 · (0.285, 0.38) + 2 · 0.4025 · (-0.8, 0.6) = (-0.5015, 0.673);  p = (2.9165, 2.547)
    """
    return [
        (1.0, [-0.9, -1.2], [0.3, 0.4], [2.7, 3.6]),
        (0.5, [1.65, 2.2], [0.285, 0.38], [2.415, 3.22]),
        (2.0, [-2.0075, -1.01], [-0.5015, 0.673], [2.9165, 2.547]),
    ]


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


def test_the_reference_gives_the_hand_worked_trace():
    param, buffer = double([3.0, 4.0]), double([0.0, 0.0])
    for lr, grad, v, p in worked_trace():
        options = {"momentum": 0.5, "weight_decay": 0.5, "trust_coefficient": 0.1, "adapt": True}
        param, buffer = lars_step(param, double(grad), buffer, lr=lr, **options)
        torch.testing.assert_close(buffer, double(v), **EXACT)
        torch.testing.assert_close(param, double(p), **EXACT)


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
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("adapt", [True, False])
def test_random_tensors_against_the_reference(shape, dtype, rtol, adapt):
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    param = torch.nn.Parameter(start.to(dtype))
    options = {"momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-2}
    optimizer = LARS([{"params": [param], "adapt": adapt}], **options)
    expected, buffer = param.detach().double().clone(), torch.zeros(shape, dtype=torch.float64)
    for lr in (0.7, 0.1, 1.3):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.param_groups[0]["lr"] = lr
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad), "a step must leave the gradient as it is"
        expected, buffer = lars_step(expected, grad.double(), buffer, lr=lr, adapt=adapt, **options)
    torch.testing.assert_close(param.data.double(), expected, rtol=rtol, atol=rtol)


def test_channels_last_weights_keep_their_layout_and_values():
    start, grad = torch.randn(8, 5, 3, 3), torch.randn(8, 5, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(start.clone().to(memory_format=layout))
        param.grad = grad.clone().to(memory_format=layout)
        optimizer = LARS([param], lr=1.0)
        optimizer.step()
        assert optimizer.state[param]["momentum"].stride() == param.stride()
        results.append(param.data)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


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
