"""What micro-batches cost and change: time, memory, and how far batch norm's own statistics turn the gradient.

ResNet-18 with the CIFAR stem, float32, one thread, one process. `whole` takes the batch through the network at once;
the others take it in micro-batches, twice forward and once backward. The gradient that they are compared with is that
of `whole`, with batch norm's statistics over the whole batch; with running statistics they are equal to rounding,
which is measured as well.

Images are textures drawn from a seed: enough for batch norm to differ from micro-batch to micro-batch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from model.build import ModelConfig, build_method
from model.methods.base import Method
from model.resnet import EncoderConfig
from train.gradient_cache import Cotangents, cached_projections, loss_gradients, micro_batches, surrogate

MICRO_BATCH_SIZES = {32: (16, 8), 128: (64, 32, 16)}  # by the size of the batch
# Of the first of them, as a share of the whole batch's: weights weigh more in a small one.
MEMORY = {32: 0.85, 128: 0.75}
SMALL, LARGE = MICRO_BATCH_SIZES
MAX_ROUNDS = 3
ROUNDING = 1e-5  # relative error of float32 gradients through 18 layers, summed in another order


def test_gradient_cache(bench: Bench) -> None:
    """Two forward passes and one backward, against one each: 4/3 of the work, where a backward is two forwards."""
    race_of_sizes(bench, SMALL)


@pytest.mark.usefixtures("large")
def test_gradient_cache_large(bench: Bench) -> None:
    race_of_sizes(bench, LARGE)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("training", [False, True])
def test_deviation(training: bool) -> None:
    """The error of the gradient and its direction, with running statistics (exact) and with those of micro-batches."""
    method, views = build_method(CONFIG, seed=0), two_views(LARGE)
    open_blocks_(method)
    settle_statistics_(method, views)
    method.train(training)
    expected = flat_gradient(method, views, None)
    print(f"\nbatch {LARGE}, statistics of {'the micro-batch' if training else 'training so far'}")
    print(f"{'micro-batch':>12}{'relative error':>16}{'cosine':>10}")
    for size in MICRO_BATCH_SIZES[LARGE]:
        gradient = flat_gradient(method, views, size)
        error = ((gradient - expected).norm() / expected.norm()).item()
        cosine = torch.cosine_similarity(gradient, expected, dim=0).item()
        print(f"{size:>12}{error:>16.2e}{cosine:>10.4f}")
        assert training or error < ROUNDING


def race_of_sizes(bench: Bench, batch_size: int) -> None:
    sizes = [*MICRO_BATCH_SIZES[batch_size], None]
    contestants = [
        Contestant(name=f"micro{size}" if size else "whole", setup=gradient_of, arguments=(batch_size, size))
        for size in sizes
    ]
    floors = {"whole": Floor(speed=0.5, goal=0.75, memory=MEMORY[batch_size])}
    bench.race(f"gradient_cache{batch_size}", "s", contestants, floors, max_rounds=MAX_ROUNDS)


CONFIG = ModelConfig(encoder=EncoderConfig(depth=18, stem="cifar"), temperature=0.5)


def gradient_of(batch_size: int, size: int | None) -> Run:
    """One item is the gradient of one batch."""
    torch.set_num_threads(1)
    method, views = build_method(CONFIG, seed=0), two_views(batch_size)
    method.to(memory_format=torch.channels_last)

    def run(num_batches: int) -> None:
        for _ in range(num_batches):
            gradient_(method, views, size)

    return run


def gradient_(method: Method, views: list[Tensor], size: int | None) -> None:
    """Into the parameters' `grad`."""
    method.zero_grad()
    if size is None:
        torch.autograd.backward(method(views)[0])
        return
    by_projection = loss_gradients(method, cached_projections(method, views, size)).by_projection
    gradients = zip(*(torch.split(gradient, size) for gradient in by_projection), strict=True)
    for piece, of_piece in zip(micro_batches(views, size), gradients, strict=True):
        given = Cotangents(list(of_piece), {})
        torch.autograd.backward(surrogate(method, method.project(piece), given))


def flat_gradient(method: Method, views: list[Tensor], size: int | None) -> Tensor:
    gradient_(method, views, size)
    """In float64, in which a norm of millions of terms is one."""
    return torch.cat(
        [parameter.grad.double().flatten() for parameter in method.parameters() if parameter.grad is not None]
    )


def two_views(num_images: int) -> list[Tensor]:
    """Textures [N, 3, 32, 32] of many scales and brightnesses, with noise of its own for each view."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(num_images, 1, 1, 1, generator=generator)
    textures = torch.rand(num_images, 3, 8, 8, generator=generator) * scales
    images = torch.nn.functional.interpolate(textures, size=32, mode="bilinear")
    views = [images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(2)]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def open_blocks_(method: Method) -> None:
    """γ = 1 everywhere: at the start SimCLR's are 0 in every block's last norm, which closes the blocks."""
    for module in method.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            torch.nn.init.ones_(weight)


@torch.no_grad()
def settle_statistics_(method: Method, views: list[Tensor]) -> None:
    """Running statistics of the batch."""
    for _ in range(30):
        method.project(views)
