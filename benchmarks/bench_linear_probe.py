"""Twenty linear heads trained at once on cached features against twenty torch loops; one thread, fp32.

One item is one batch of 256 rows for every head: `twinview` gathers the rows once and updates all heads by matrix
products over all of them; `torch_loops` is what one writes without it, an `nn.Linear`, cross-entropy and
`torch.optim.SGD` for each head, which gathers its rows itself. Both take the same steps from the same start.

Works are named after what the features would be of: `resnet18_cifar10` has 512 features and 10 classes, where calls
cost more than arithmetic; `resnet50_100_classes` has 2,048 and 100, where the products are nearly all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from train.evaluation.linear_probe import Head, LinearHeads


class Work(NamedTuple):
    """Sizes of the features, and what ours must reach against the loops."""

    width: int
    num_classes: int
    floor: Floor


# Floors are two thirds of what was measured (EPYC, one thread, November 2026), so that noise does not fail them.
WORKS = {
    "resnet18_cifar10": Work(512, 10, Floor(speed=2.2, goal=3.0)),
    "resnet50_100_classes": Work(2048, 100, Floor(speed=0.75, goal=1.2)),
}
NUM_ROWS, BATCH = 4096, 256
HEADS = [
    Head(base_lr=lr, weight_decay=decay) for lr in (0.01, 0.03, 0.1, 0.3, 1.0) for decay in (0.0, 1e-6, 1e-5, 1e-4)
]


@pytest.mark.parametrize("name", WORKS)
def test_heads(bench: Bench, name: str) -> None:
    contestants = [Contestant(name=who, setup=steps, arguments=(who, name)) for who in STEPS]
    bench.race(name, "s", contestants, {"torch_loops": WORKS[name].floor}, one_core=True)


def steps(who: str, name: str) -> Run:
    """One item is one batch for all heads."""
    torch.set_num_threads(1)
    work = WORKS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, work.width, generator=generator).relu()
    labels = torch.randint(work.num_classes, (NUM_ROWS,), generator=generator)
    order = torch.split(torch.randperm(NUM_ROWS, generator=generator), BATCH)
    step = STEPS[who](x, labels, work.num_classes)
    for rows in order[:2]:
        step(rows)

    def run(num_steps: int) -> None:
        for i in range(num_steps):
            step(order[i % len(order)])

    return run


def twinview_step(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], None]:
    heads = LinearHeads(HEADS, x.shape[1], num_classes)

    def step(rows: Tensor) -> None:
        heads.step(x[rows], labels[rows], lr_factor=1.0)

    return step


def torch_loops_step(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], None]:
    trainings = []
    for head in HEADS:
        layer = nn.Linear(x.shape[1], num_classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        groups: list[dict[str, Any]] = [
            {"params": [layer.weight], "weight_decay": head.weight_decay},
            {"params": [layer.bias]},
        ]
        trainings.append((layer, torch.optim.SGD(groups, lr=head.base_lr, momentum=0.9, nesterov=True, fused=True)))

    def step(rows: Tensor) -> None:
        for layer, optimizer in trainings:
            loss = nn.functional.cross_entropy(layer(x[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    return step


STEPS: dict[str, Callable[[Tensor, Tensor, int], Callable[[Tensor], None]]] = {
    "twinview": twinview_step,
    "torch_loops": torch_loops_step,
}
