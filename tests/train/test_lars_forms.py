"""The forms of LARS against numbers worked out by hand, lightly's LARS and torch's SGD."""

import pytest
import torch

from train.optim.lars import LARS
from train.optim.lars_reference import lars_step
from train.optim.stretches import FORMS

EXACT = {"rtol": 0, "atol": 1e-14}  # float64 on numbers of order 1
BUT_FOR_EPS = {"rtol": 0, "atol": 3e-9}  # the traces of larc leave out its ε of 1e-8

# Three steps by hand, with m = 0.5, λ = 0.5, η = 0.1, p = (3, 4): lr, raw gradient, v and p after it.
TRACES = {
    # 1. lr 1:   g + λp = (-0.9, -1.2) + (1.5, 2) = (0.6, 0.8), norm 1; ‖p‖ = 5; r = 0.1 · 5 / 1 = 0.5
    #            v = 1 · 0.5 · (0.6, 0.8) = (0.3, 0.4);  p = (2.7, 3.6)
    # 2. lr 0.5: g + λp = (1.65, 2.2) + (1.35, 1.8) = (3, 4), norm 5; ‖p‖ = 4.5; r = 0.1 · 4.5 / 5 = 0.09
    #            v = 0.5 · (0.3, 0.4) + 0.5 · 0.09 · (3, 4) = (0.285, 0.38);  p = (2.415, 3.22)
    # 3. lr 2:   g + λp = (-2.0075, -1.01) + (1.2075, 1.61) = (-0.8, 0.6), norm 1; ‖p‖ = 4.025; r = 0.4025
    #            v = 0.5 · (0.285, 0.38) + 2 · 0.4025 · (-0.8, 0.6) = (-0.5015, 0.673);  p = (2.9165, 2.547)
    ("classic", False): [
        (1.0, [-0.9, -1.2], [0.3, 0.4], [2.7, 3.6]),
        (0.5, [1.65, 2.2], [0.285, 0.38], [2.415, 3.22]),
        (2.0, [-2.0075, -1.01], [-0.5015, 0.673], [2.9165, 2.547]),
    ],
    # With n = lr r (g + λp), v = m v + n and p = p − (m v + n):
    # 1. n = (0.3, 0.4) as above;  v = n;  p = (3, 4) − (0.45, 0.6)
    # 2. g + λp = (3, 4); ‖p‖ = 4.25; r = 0.085; n = 0.5 · 0.085 · (3, 4) = (0.1275, 0.17)
    #    v = (0.2775, 0.37);  p = (2.55, 3.4) − (0.13875 + 0.1275, 0.185 + 0.17)
    # 3. g + λp = (-0.8, 0.6); ‖p‖ = 3.80625; n = 2 · 0.380625 · (-0.8, 0.6) = (-0.609, 0.45675)
    #    v = (0.13875 − 0.609, 0.185 + 0.45675);  p = (2.28375, 3.045) − (-0.235125 − 0.609, 0.320875 + 0.45675)
    ("classic", True): [
        (1.0, [-0.9, -1.2], [0.3, 0.4], [2.55, 3.4]),
        (0.5, [1.725, 2.3], [0.2775, 0.37], [2.28375, 3.045]),
        (2.0, [-1.941875, -0.9225], [-0.47025, 0.64175], [3.127875, 2.267375]),
    ],
    # 1. v = g + λp = (0.6, 0.8), norm 1; r = 0.5;  p = (3, 4) − 0.5 · v
    # 2. g + λp = (2.7, 3.6); v = (0.3, 0.4) + (2.7, 3.6) = (3, 4), norm 5; r = 0.1 · 4.5 / 5 = 0.09
    #    p = (2.7, 3.6) − 0.5 · 0.09 · (3, 4)
    # 3. g + λp = (-2.3, -1.4); v = (1.5, 2) + (-2.3, -1.4) = (-0.8, 0.6), norm 1; ‖p‖ = 4.275
    #    p = (2.565, 3.42) − 2 · 0.4275 · (-0.8, 0.6)
    ("non_classic", False): [
        (1.0, [-0.9, -1.2], [0.6, 0.8], [2.7, 3.6]),
        (0.5, [1.35, 1.8], [3.0, 4.0], [2.565, 3.42]),
        (2.0, [-3.5825, -3.11], [-0.8, 0.6], [3.249, 2.907]),
    ],
    # With u = m v + (g + λp):
    # 1. v = (0.6, 0.8); u = (0.9, 1.2), norm 1.5; r = 0.1 · 5 / 1.5;  p = (3, 4) − (0.3, 0.4)
    # 2. v = (3, 4) as above; u = (1.5, 2) + (2.7, 3.6) = (4.2, 5.6), norm 7; r = 0.45 / 7
    #    p = (2.7, 3.6) − 0.5 · 0.45 · (0.6, 0.8)
    # 3. g + λp = (-2.5, 2); v = (-1, 4); u = (-0.5, 2) + (-2.5, 2) = (-3, 4), norm 5; r = 0.1 · 4.275 / 5 = 0.0855
    #    p = (2.565, 3.42) − 2 · 0.0855 · (-3, 4)
    ("non_classic", True): [
        (1.0, [-0.9, -1.2], [0.6, 0.8], [2.7, 3.6]),
        (0.5, [1.35, 1.8], [3.0, 4.0], [2.565, 3.42]),
        (2.0, [-3.7825, 0.29], [-1.0, 4.0], [3.078, 2.736]),
    ],
    # 1. ‖g‖ + λ‖p‖ = 2.5 + 2.5; r = 0.1; g + λp = (3, 4);  v = (0.3, 0.4);  p = (3, 4) − v
    # 2. ‖g‖ + λ‖p‖ = 2.25 + 2.25; r = 0.1 · 4.5 / 4.5; g + λp = (2.7, 3.6);  v = (0.15, 0.2) + (0.27, 0.36)
    #    p = (2.7, 3.6) − 0.5 · (0.42, 0.56)
    # 3. ‖g‖ + λ‖p‖ = 6.225 + 2.075; r = 0.1 · 4.15 / 8.3 = 0.05; g + λp = (-3.735, 5.395)
    #    v = (0.21, 0.28) + (-0.18675, 0.26975);  p = (2.49, 3.32) − 2 · (0.02325, 0.54975)
    ("larc", False): [
        (1.0, [1.5, 2.0], [0.3, 0.4], [2.7, 3.6]),
        (0.5, [1.35, 1.8], [0.42, 0.56], [2.49, 3.32]),
        (2.0, [-4.98, 3.735], [0.02325, 0.54975], [2.4435, 2.2205]),
    ],
    # With n = r (g + λp), v = m v + n and p = p − lr (m v + n):
    # 1. n = (0.3, 0.4);  p = (3, 4) − (0.45, 0.6)
    # 2. ‖g‖ + λ‖p‖ = 2.125 + 2.125; r = 0.1 · 4.25 / 4.25; n = 0.1 · (2.55, 3.4);  v = (0.405, 0.54)
    #    p = (2.55, 3.4) − 0.5 · (0.2025 + 0.255, 0.27 + 0.34)
    # 3. ‖p‖ = 3.86875; ‖g‖ + λ‖p‖ = 5.803125 + 1.934375; r = 0.05; n = 0.05 · (-3.481875, 5.029375)
    #    v = (0.2025, 0.27) + n;  p = (2.32125, 3.095) − 2 · (0.5 v + n)
    ("larc", True): [
        (1.0, [1.5, 2.0], [0.3, 0.4], [2.55, 3.4]),
        (0.5, [1.275, 1.7], [0.405, 0.54], [2.32125, 3.095]),
        (2.0, [-4.6425, 3.481875], [0.02840625, 0.52146875], [2.64103125, 2.07059375]),
    ],
}
every_trace = pytest.mark.parametrize(("form", "nesterov"), TRACES)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@every_trace
def test_the_reference_gives_the_hand_worked_traces(form, nesterov):
    param, buffer = double([3.0, 4.0]), double([0.0, 0.0])
    options = {"momentum": 0.5, "weight_decay": 0.5, "trust_coefficient": 0.1, "adapt": True}
    tolerance = BUT_FOR_EPS if form == "larc" else EXACT
    for lr, grad, v, p in TRACES[form, nesterov]:
        param, buffer = lars_step(param, double(grad), buffer, lr=lr, form=form, nesterov=nesterov, **options)
        torch.testing.assert_close(buffer, double(v), **tolerance)
        torch.testing.assert_close(param, double(p), **tolerance)


@every_trace
def test_the_optimizer_gives_the_hand_worked_traces(form, nesterov):
    param = torch.nn.Parameter(double([[3.0], [4.0]]))
    optimizer = LARS([param], momentum=0.5, weight_decay=0.5, trust_coefficient=0.1, form=form, nesterov=nesterov)
    tolerance = BUT_FOR_EPS if form == "larc" else EXACT
    for lr, grad, v, p in TRACES[form, nesterov]:
        optimizer.param_groups[0]["lr"] = lr
        param.grad = double(grad)[:, None]
        optimizer.step()
        torch.testing.assert_close(optimizer.state[param]["momentum"][:, 0], double(v), **tolerance)
        torch.testing.assert_close(param.data[:, 0], double(p), **tolerance)


@pytest.mark.parametrize("nesterov", [False, True])
def test_larc_is_what_lightly_does(nesterov):
    """Parameters that are zero, gradients that are zero, and a group without decay, which lightly does not adapt."""
    lightly_lars = pytest.importorskip("lightly.utils.lars", reason="lightly needs requirements-bench.txt")
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(41, 7), (5, 3, 3), (1271,)]]
    starts[1].zero_()
    options = {"lr": 0.7, "momentum": 0.9, "nesterov": nesterov, "trust_coefficient": 0.02}
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    our_groups, their_groups = (
        [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:], "weight_decay": 0.0}]
        for params in (ours, theirs)
    )
    our_groups[1]["adapt"] = False
    optimizers = [LARS(our_groups, form="larc", **options), lightly_lars.LARS(their_groups, **options)]
    for lr in (0.7, 0.0, 1.9, 0.2, 0.2):
        grads = [torch.randn(start.shape, generator=generator, dtype=torch.float64) for start in starts]
        if lr == 1.9:
            grads[0].zero_()
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our.data, their.data, rtol=1e-13, atol=1e-13)
    assert not torch.equal(ours[1], starts[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_without_adaptation_every_form_is_torch_sgd(form, nesterov):
    """At one rate: classic momentum is that of SGD times the rate."""
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(41, 7, generator=generator, dtype=torch.float64)
    options = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        LARS([{"params": [ours], "adapt": False}], form=form, **options),
        torch.optim.SGD([theirs], **options),
    ]
    for _ in range(4):
        grad = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-13, atol=1e-13)
