"""NT-Xent forward and backward: ours against those that build the whole matrix; one thread, fp32, width 128.

Works are named after the number of images N: `ntxent1024` has 2048 rows. `lightly` and `metric_learning` are the
packages' own classes, `google` and `solo_learn` forms of published code. The median is the seconds of one call, which
computes the loss and its gradient for both views' projections; the peak is the memory that the call takes beside the
projections. Single-threaded, since many small multi-threaded operations measure the machine's other load rather than
the code.

The others' memory is quadratic or cubic in N: who would not fit is left out, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from benchmarks.peers.nt_xent_forms import google_nt_xent, solo_learn_nt_xent
from benchmarks.peers.nt_xent_packages import NTXent, lightly, metric_learning
from model.ntxent.loss import nt_xent

WIDTH = 128
TEMPERATURE = 0.1
FORMS: dict[str, Callable[[], NTXent]] = {
    "twinview": lambda: lambda z1, z2: nt_xent(z1, z2, temperature=TEMPERATURE).loss,
    "lightly": lambda: lightly(TEMPERATURE),
    "google": lambda: partial(google_nt_xent, temperature=TEMPERATURE),
    "solo_learn": lambda: partial(solo_learn_nt_xent, temperature=TEMPERATURE),
    "metric_learning": lambda: metric_learning(TEMPERATURE),
}
# Bytes at the peak, as measured: for each number of a matrix [N, N], and for metric_learning of an array [2N, 2N, 2N].
BYTES_PER_NUMBER = {"lightly": 68, "google": 53, "solo_learn": 69, "metric_learning": 17}

# Two thirds of what was measured (EPYC, one thread, November 2026), so that noise does not fail them; the goals are
# what the design aims at, as is a thirtieth of the memory.
MEMORY = 1 / 30
FLOORS: dict[int, dict[str, Floor]] = {
    256: {"metric_learning": Floor(speed=600, goal=900, memory=1 / 300)},
    1024: {
        "lightly": Floor(speed=4.5, goal=3.0),
        "google": Floor(speed=2.0, goal=1.5),
        "solo_learn": Floor(speed=3.5, goal=3.0),
    },
    4096: {
        "lightly": Floor(speed=7.0, goal=6.0, memory=MEMORY),
        "google": Floor(speed=4.2, goal=3.5, memory=MEMORY),
        "solo_learn": Floor(speed=6.2, goal=6.0, memory=MEMORY),
    },
    8192: {
        "lightly": Floor(speed=7.0, goal=7.0, memory=MEMORY),
        "google": Floor(speed=4.2, goal=4.5, memory=MEMORY),
        "solo_learn": Floor(speed=6.2, goal=7.0, memory=MEMORY),
    },
    32768: {},
}
FEW_ROUNDS = 2  # where one call takes tens of seconds


@pytest.mark.parametrize("num_images", [256, pytest.param(1024, marks=pytest.mark.quick), 4096])
def test_ntxent(bench: Bench, num_images: int) -> None:
    work = f"ntxent{num_images}"
    quick = ("lightly", "google")
    bench.race(work, "s", contestants(num_images), FLOORS[num_images], one_core=True, quick=quick)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("num_images", "max_rounds"), [(8192, None), (32768, FEW_ROUNDS)])
def test_ntxent_large(bench: Bench, num_images: int, max_rounds: int | None) -> None:
    work = f"ntxent{num_images}"
    bench.race(work, "s", contestants(num_images), FLOORS[num_images], max_rounds=max_rounds, one_core=True)


def contestants(num_images: int) -> list[Contestant]:
    return [
        Contestant(
            name=name, setup=calls, arguments=(name, num_images), work_mib=expected_bytes(name, num_images) / 2**20
        )
        for name in FORMS
    ]


def expected_bytes(name: str, num_images: int) -> int:
    """What a call takes at its peak; 0 where that is linear in N."""
    numbers = (2 * num_images) ** 3 if name == "metric_learning" else num_images**2
    return BYTES_PER_NUMBER.get(name, 0) * numbers


def calls(name: str, num_images: int) -> Run:
    """One item is the loss of a batch and its gradient for both views' projections."""
    torch.set_num_threads(1)
    form = FORMS[name]()
    loss_and_gradients(form, *projections(64))  # loads what a first call loads
    z1, z2 = projections(num_images)

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            loss_and_gradients(form, z1, z2)

    return run


def loss_and_gradients(form: NTXent, z1: Tensor, z2: Tensor) -> Tensor:
    """The loss; its gradients are in `z1.grad` and `z2.grad` afterwards."""
    z1.grad = z2.grad = None
    loss = form(z1, z2)
    torch.autograd.backward(loss)
    return loss.detach()


def projections(num_images: int) -> tuple[Tensor, Tensor]:
    """Two views' projections [N, WIDTH]; positives are alike."""
    generator = torch.Generator().manual_seed(num_images)
    z1 = torch.randn(num_images, WIDTH, generator=generator)
    z2 = z1 + torch.randn(num_images, WIDTH, generator=generator)
    return z1.requires_grad_(), z2.requires_grad_()
