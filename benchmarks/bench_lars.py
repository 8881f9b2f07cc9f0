"""One LARS step over ResNet-50's 161 tensors (25.6 million parameters): ours against others' loops; one thread, fp32.

The median is the seconds of one step, the peak the memory that it takes beside parameters, gradients and momentum.
`torch_sgd` is torch's fused SGD, which has no norms to compute: the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from benchmarks.peers.lars_forms import ApexLARC, LightlyLARS
from model.resnet import EncoderConfig, ResNet
from train.optim.lars import LARS
from train.optim.lars_reference import lars_step
from train.optim.param_groups import param_groups

SETTINGS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}  # so low a rate that thousands of steps change little
TRUST_COEFFICIENT = 1e-3
WEIGHT_DECAY = 1e-6

# Two thirds of what was measured (EPYC, one thread, November 2026), so that noise does not fail them; the goals are
# what the design aims at, and for torch_sgd what a fused prototype reached.
FLOORS = {
    "lightly": Floor(speed=0.75, goal=1.5),
    "apex_larc": Floor(speed=0.85, goal=1.8),
    "reference": Floor(speed=1.3, goal=3.0),
    "torch_sgd": Floor(speed=0.27, goal=0.5),
}


def test_resnet50(bench: Bench) -> None:
    names = ("twinview", *FLOORS)
    contestants = [Contestant(name=name, setup=optimizer_steps, arguments=(name,)) for name in names]
    bench.race("resnet50", "s", contestants, FLOORS)


def optimizer_steps(name: str) -> Run:
    """One item is one step; the gradients stay what they are (but for `apex_larc`, which rewrites them)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = ResNet(EncoderConfig(depth=50))
    model = nn.ModuleList([encoder, nn.Linear(encoder.feature_dim, 1000)])
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    step = STEPS[name](param_groups(model, WEIGHT_DECAY))
    step()  # makes the momentum

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            step()

    return run


def reference_step(groups: list[dict[str, Any]]) -> Callable[[], None]:
    """The formula, parameter by parameter."""
    buffers = [[torch.zeros_like(param) for param in group["params"]] for group in groups]

    @torch.no_grad()
    def step() -> None:
        for group, group_buffers in zip(groups, buffers, strict=True):
            options = {"weight_decay": group["weight_decay"], "adapt": group["adapt"]}
            for i, param in enumerate(group["params"]):
                new, group_buffers[i] = lars_step(
                    param, param.grad, group_buffers[i], trust_coefficient=TRUST_COEFFICIENT, **SETTINGS, **options
                )
                param.copy_(new)

    return step


STEPS: dict[str, Callable[[list[dict[str, Any]]], Callable[[], Any]]] = {
    "twinview": lambda groups: LARS(groups, trust_coefficient=TRUST_COEFFICIENT, **SETTINGS).step,
    "lightly": lambda groups: LightlyLARS(groups, trust_coefficient=TRUST_COEFFICIENT, **SETTINGS).step,
    "apex_larc": lambda groups: ApexLARC(groups, trust_coefficient=TRUST_COEFFICIENT, **SETTINGS).step,
    "reference": reference_step,
    "torch_sgd": lambda groups: SGD(groups, fused=True, **SETTINGS).step,
}
