"""One LARS step over a network's tensors: ours against others' loops; one thread, fp32.

Works are networks with a linear layer for ImageNet's classes: `resnet50` has 161 tensors of 25.6 million numbers in
all, `resnet152x3sk` (three times as wide, selective kernels) 673 of 801 million. `lightly` is the package's own class,
`apex_larc` a form of apex's published code, `reference` our formula parameter by parameter, and `torch_sgd` torch's
fused SGD, which has no norms to compute: the floor. The median is the seconds of one step, the peak the memory that it
takes beside parameters, gradients and momentum.

The large network's parameters, gradients and momentum take 9 GiB of every contestant: where the memory does not hold
all of them, they race in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from benchmarks.peers.apex_larc_form import ApexLARC
from model.resnet import EncoderConfig, ResNet
from train.optim.lars import LARS
from train.optim.lars_reference import lars_step
from train.optim.param_groups import param_groups

Groups = list[dict[str, Any]]
Settings = dict[str, Any]

ENCODERS = {
    "resnet50": EncoderConfig(depth=50),
    "resnet152x3sk": EncoderConfig(depth=152, width=3, selective_kernel=True),
}
NUM_CLASSES = 1000
WEIGHT_DECAY = 1e-6
# So low a rate that thousands of steps change little.
SETTINGS: Settings = {"lr": 1e-3, "momentum": 0.9, "trust_coefficient": 1e-3}
# Memory of a step in sizes of the largest tensor, as measured; the others need none that is worth mentioning.
NUM_TEMPORARIES = {"lightly": 1.3, "apex_larc": 1.2, "reference": 8.0}

# Two thirds of what was measured (EPYC, one thread, November 2026), so that noise does not fail them; the goals are
# what the design aims at, and for torch_sgd what a fused prototype reached.
FLOORS = {
    "lightly": Floor(speed=1.4, goal=1.5),
    "apex_larc": Floor(speed=1.7, goal=1.8),
    "torch_sgd": Floor(speed=0.45, goal=0.5),
    "reference": Floor(speed=2.5, goal=3.0),
}


@pytest.mark.quick
def test_resnet50(bench: Bench) -> None:
    bench.race("resnet50", "s", contestants("resnet50"), FLOORS, one_core=True, quick=("lightly", "torch_sgd"))


@pytest.mark.usefixtures("large")
def test_resnet152x3sk(bench: Bench) -> None:
    work = "resnet152x3sk"
    bench.race(work, "s", contestants(work), FLOORS, one_core=True)


def contestants(network: str) -> list[Contestant]:
    sizes = [param.numel() * param.element_size() for param in _all_params(meta_groups(network))]
    return [
        Contestant(
            name=name,
            setup=steps,
            arguments=(name, network),
            held_mib=3 * sum(sizes) / 2**20,  # parameters, gradients and momentum
            work_mib=NUM_TEMPORARIES.get(name, 0.0) * max(sizes) / 2**20,
        )
        for name in STEPS
    ]


def steps(name: str, network: str) -> Run:
    """One item is one step; the gradients stay what they are (but for `apex_larc`, which rewrites them)."""
    torch.set_num_threads(1)
    step = STEPS[name](filled(meta_groups(network)), SETTINGS)
    step()  # makes the momentum

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            step()

    return run


def meta_groups(network: str) -> Groups:
    """The network's parameters as an optimizer is given them, without memory."""
    with torch.device("meta"):
        encoder = ResNet(ENCODERS[network])
        model = nn.ModuleList([encoder, nn.Linear(encoder.feature_dim, NUM_CLASSES)])
    return param_groups(model, WEIGHT_DECAY)


def filled(groups: Groups) -> Groups:
    """The same with parameters in memory, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        group["params"] = [
            nn.Parameter(torch.empty(param.shape).normal_(std=0.05, generator=generator)) for param in group["params"]
        ]
    for param in _all_params(groups):
        param.grad = torch.empty(param.shape).normal_(generator=generator)
    return groups


def _all_params(groups: Groups) -> Iterator[Tensor]:
    for group in groups:
        yield from group["params"]


def reference_step(groups: Groups, settings: Settings) -> Callable[[], None]:
    """The formula, parameter by parameter."""
    buffers = [[torch.zeros_like(param) for param in group["params"]] for group in groups]

    @torch.no_grad()
    def step() -> None:
        for group, group_buffers in zip(groups, buffers, strict=True):
            options = {"weight_decay": group["weight_decay"], "adapt": group["adapt"]}
            for i, param in enumerate(group["params"]):
                new, group_buffers[i] = lars_step(param, param.grad, group_buffers[i], **settings, **options)
                param.copy_(new)

    return step


def lightly_step(groups: Groups, settings: Settings) -> Callable[[], Any]:
    """Step as the package lightly does; groups without weight decay are not scaled."""
    from lightly.utils.lars import LARS as LightlyLARS  # seconds to import, and an optional package  # noqa: N811

    step: Callable[[], Any] = LightlyLARS(groups, **settings).step
    return step


def torch_sgd_step(groups: Groups, settings: Settings) -> Callable[[], Any]:
    """Without scaling."""
    return SGD(groups, lr=settings["lr"], momentum=settings["momentum"], fused=True).step


STEPS: dict[str, Callable[[Groups, Settings], Callable[[], Any]]] = {
    "twinview": lambda groups, settings: LARS(groups, **settings).step,
    "lightly": lightly_step,
    "apex_larc": lambda groups, settings: ApexLARC(groups, **settings).step,
    "torch_sgd": torch_sgd_step,
    "reference": reference_step,
}
