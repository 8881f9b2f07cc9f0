"""NT-Xent forward and backward on the current CUDA device, width 128: time, share of the tensor cores, memory.

`twinview_kernels` is a CUDA graph of all that a call starts on the device. `matmul` does as many operations as the loss
cannot do without, 6·(2N)²·D in float16 (2 forward, 4 backward), as one large product: what `twinview_kernels` reaches
of its rate is the share of the ceiling. fp32 input takes three products of float16 for each, so that a third is the
most that it can reach. `twinview` is the call itself, raced against forms that build the matrix.

An item is the loss of a batch and its gradient. Without a CUDA device the works are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Bench, is_installed
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from benchmarks.peers.nt_xent_forms import google_nt_xent
from benchmarks.peers.nt_xent_packages import NTXent, lightly
from model.ntxent.loss import nt_xent

WIDTH = 128
TEMPERATURE = 0.1
CEILING_SIDE = 8192  # of the matrices that `matmul` multiplies
STEP = 64  # calls between two looks at the clock
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
FORMS: dict[str, Callable[[float], NTXent]] = {
    "twinview": lambda temperature: lambda z1, z2: nt_xent(z1, z2, temperature=temperature).loss,
    "lightly": lightly,
    "google": lambda temperature: _on_the_gpu(lambda z1, z2: google_nt_xent(z1, z2, temperature)),
}

# Estimates, from what Triton 3.9 compiles for sm_90; no measurement yet. A processor does 4096 float16 operations and
# 16 exponentials a cycle. A tile of 128 × 64 similarities takes 512 cycles for each of its products (one forward, two
# backward), 512 for its exponentials, and 150 to 300 for what stands around them. Nothing done at the same time, that
# is 0.43 of the ceiling forward and 0.6 backward; two programs share a processor forward, so that products and
# exponentials overlap. Masks, sums and starting the kernels take the rest. Two thirds of a goal are asserted.
CEILING_GOALS = {"fp16": 0.45, "fp32": 0.17}
CALL_GOALS = {"lightly": 6.0, "google": 6.0}
MEMORY = 1 / 10  # of lightly's, at most

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_images", [4096, 16384])
def test_ntxent(num_images: int, dtype: str, bench: Bench) -> None:
    races = {"kernels": ("twinview_kernels", {"matmul": CEILING_GOALS[dtype]}), "call": ("twinview", CALL_GOALS)}
    for race, (ours, goals) in races.items():
        entrants = [
            Contestant(name=name, setup=calls, arguments=(name, num_images, dtype), step=STEP)
            for name in (ours, *goals)
        ]
        before = len(bench.rows)
        floors = {name: Floor(speed=goal * 2 / 3, goal=goal) for name, goal in goals.items()}
        try:
            bench.race(f"gpu_ntxent{num_images}_{dtype}_{race}", "s", entrants, floors)
        finally:
            for row in bench.rows[before:]:
                print(f"{row.contestant:16} {operations(num_images) / row.median / 1e12:8.1f} TFLOP/s")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_images", [4096])
def test_memory(num_images: int, dtype: str) -> None:
    peaks = {name: _extra_mib(name, num_images, DTYPES[dtype]) for name in FORMS if is_installed(name)}
    print(f"\nextra memory, N = {num_images}, {dtype}: " + ", ".join(f"{n} {mib:.0f} MiB" for n, mib in peaks.items()))
    assert peaks["twinview"] < MEMORY * peaks.get("lightly", peaks["google"])


def operations(num_images: int) -> float:
    """That the loss and its gradient cannot do without."""
    return 6.0 * (2 * num_images) ** 2 * WIDTH


def calls(name: str, num_images: int, dtype: str) -> Run:
    """One of the contestants."""
    if name == "matmul":
        return _products(num_images)
    z1, z2 = _projections(num_images, DTYPES[dtype])
    form = FORMS[name.removesuffix("_kernels")](TEMPERATURE)

    def call() -> object:
        return _call(form, z1, z2)

    one = _graph(call) if name == "twinview_kernels" else call

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            one()
        torch.cuda.synchronize()

    run(STEP)
    return run


def _projections(num_images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views' projections [N, WIDTH]; positives are alike."""
    z1 = torch.randn(num_images, WIDTH, device="cuda")
    z2 = z1 + torch.randn(num_images, WIDTH, device="cuda")
    return z1.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_()


def _call(form: NTXent, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(z1, z2), (z1, z2))


def _on_the_gpu(form: NTXent) -> NTXent:
    """A form that makes its labels and masks on torch's default device."""

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.device("cuda"):
            return form(z1, z2)

    return call


def _graph(call: Callable[[], object]) -> Callable[[], Any]:
    """All that a call starts on the device."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _products(num_images: int) -> Run:
    """As many operations as calls of the loss, in large products."""
    left, right = torch.randn(2, CEILING_SIDE, CEILING_SIDE, device="cuda", dtype=torch.float16)
    out = torch.empty_like(left)

    def run(num_calls: int) -> None:
        for _ in range(round(num_calls * operations(num_images) / (2.0 * CEILING_SIDE**3))):
            torch.mm(left, right, out=out)
        torch.cuda.synchronize()

    run(STEP)
    return run


def _extra_mib(name: str, num_images: int, dtype: torch.dtype) -> float:
    """The most that a call holds beside its input."""
    form = FORMS[name](TEMPERATURE)
    z1, z2 = _projections(num_images, dtype)
    _call(form, z1, z2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _call(form, z1, z2)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
