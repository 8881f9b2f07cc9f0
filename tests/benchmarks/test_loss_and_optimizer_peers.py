"""Contestants of the loss and of the optimizer do equal work: the values and gradients of their formulas.

What they are expected to take of the memory is what they take.
"""

import pytest
import torch

from benchmarks import bench_lars, bench_ntxent
from benchmarks.conftest import OPTIONAL_MODULES
from benchmarks.harness import race
from model.ntxent.reference import nt_xent_reference


def need(name):
    if name in OPTIONAL_MODULES:
        pytest.importorskip(OPTIONAL_MODULES[name], reason=f"{name} needs requirements-bench.txt")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", bench_ntxent.FORMS)
def test_loss_and_both_gradients_are_the_papers(name, dtype, tolerance):
    need(name)
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(13, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    exact, _ = nt_xent_reference(z1, z2, temperature=bench_ntxent.TEMPERATURE, normalize=True)
    exact_grads = torch.autograd.grad(exact, (z1, z2))
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
    factor = 2.0 if name == "google" else 1.0  # it adds the views' means
    form = bench_ntxent.FORMS[name]()
    for _ in range(2):  # a second call starts anew
        loss = bench_ntxent.loss_and_gradients(form, z1, z2)
        torch.testing.assert_close(loss.double(), factor * exact.detach(), rtol=tolerance, atol=0)
        for z, exact_grad in zip((z1, z2), exact_grads, strict=True):
            torch.testing.assert_close(z.grad.double(), factor * exact_grad, rtol=tolerance, atol=tolerance)


def test_all_are_given_the_same_projections():
    first, second = bench_ntxent.projections(8), bench_ntxent.projections(8)
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)


@pytest.mark.parametrize(
    ("name", "num_images"), [("lightly", 3000), ("google", 3000), ("solo_learn", 3000), ("metric_learning", 100)]
)
def test_the_memory_expected_is_the_memory_taken(name, num_images):
    need(name)
    (entrant,) = (entrant for entrant in bench_ntxent.contestants(num_images) if entrant.name == name)
    measured = race("ntxent", "s", [entrant], rounds=0, seconds=0.0).warm_ups[name].peak_mib
    assert 0.9 * entrant.work_mib < measured < 1.1 * entrant.work_mib


def test_ours_takes_no_matrix():
    ours, *others = bench_ntxent.contestants(4096)
    assert (ours.name, ours.work_mib) == ("twinview", 0)
    assert all(other.work_mib > 800 for other in others)


# p = (3, 4), g = (0.6, 0.8), λ = 0.2, η = 0.1. With the trust ratio r, of parallel vectors the same in all forms:
# r = 0.1 · 5 / (1 + 0.2 · 5) = 0.25; g + λp = (1.2, 1.6); v = 0.25 (1.2, 1.6) = (0.3, 0.4); p = p − 2 v = (2.4, 3.2).
# Then r = 0.1 · 4 / (1 + 0.2 · 4) = 2/9; g + λp = (1.08, 1.44); v = 0.5 (0.3, 0.4) + (0.24, 0.32) = (0.39, 0.52).
# Without it: v = (1.2, 1.6), p = (0.6, 0.8); g + λp = (0.72, 0.96), v = (1.32, 1.76).
LARS_BY_HAND = ([2.4, 3.2], [1.62, 2.16])
SGD_BY_HAND = ([0.6, 0.8], [-2.04, -2.72])
SETTINGS = {"lr": 2.0, "momentum": 0.5, "trust_coefficient": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", bench_lars.STEPS)
def test_steps_by_hand(name, dtype):
    need(name)
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    param.grad = torch.tensor([0.6, 0.8], dtype=dtype)
    group = {"params": [param], "param_names": ["p"], "weight_decay": 0.2, "adapt": True}
    step = bench_lars.STEPS[name]([group], SETTINGS)
    for expected in SGD_BY_HAND if name == "torch_sgd" else LARS_BY_HAND:
        param.grad.copy_(torch.tensor([0.6, 0.8]))
        step()
        torch.testing.assert_close(param.data, torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("twinview", 2.0), ("lightly", 2.0), ("reference", 2.0), ("apex_larc", 2.4)]
)
def test_what_is_not_adapted_is_not_scaled_but_by_apex(name, expected):
    need(name)
    param = torch.nn.Parameter(torch.tensor([3.0]))
    param.grad = torch.tensor([0.5])
    group = {"params": [param], "param_names": ["p"], "weight_decay": 0.0, "adapt": False}
    bench_lars.STEPS[name]([group], SETTINGS)()
    assert param.item() == pytest.approx(expected)  # 3 − 2 · 0.5; apex: 3 − 2 · 0.1 · 3


def test_the_networks_tensors_are_laid_out_without_the_network():
    groups = bench_lars.meta_groups("resnet50")
    params = [param for group in groups for param in group["params"]]
    assert all(param.is_meta for param in params)
    assert (len(params), sum(param.numel() for param in params)) == (161, 25_557_032)  # torchvision's
    adapted, plain = groups
    assert (adapted["adapt"], adapted["weight_decay"], len(adapted["params"])) == (True, bench_lars.WEIGHT_DECAY, 54)
    assert (plain["adapt"], plain["weight_decay"]) == (False, 0.0)
    (entrant,) = (entrant for entrant in bench_lars.contestants("resnet50") if entrant.name == "twinview")
    assert entrant.held_mib == pytest.approx(3 * 4 * 25_557_032 / 2**20)


def test_tensors_are_filled_the_same_for_all():
    def small():
        return bench_lars.filled([{"params": [torch.empty(5, 3, device="meta"), torch.empty(4, device="meta")]}])

    (first,), (second,) = small(), small()
    for a, b in zip(first["params"], second["params"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
        assert a.norm() > 0
        assert a.grad.norm() > 0
