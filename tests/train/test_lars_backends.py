"""LARS's backends against the formula in float64: the torch loop, the compiled CPU kernel; which one is chosen."""

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from native.compiled import source_hash
from tests.train.lars_cases import VARIANTS, assert_close_to, clone, expected_step, random_stretches
from train.optim import lars_backends, lars_fused, lars_loop
from train.optim.lars import LARS
from train.optim.lars_backends import check_backend, choose_backend
from train.optim.lars_numba import kernel

BACKENDS = {"reference": lars_loop, "fused": lars_fused}
every_variant = pytest.mark.parametrize(("form", "nesterov"), VARIANTS)
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@pytest.fixture
def num_threads():
    """Sets torch's threads, which are as many as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_backend
@every_variant
def test_a_step_against_float64(backend, form, nesterov):
    stretches = random_stretches(form, nesterov)
    expected, grads = expected_step(stretches), [grad.clone() for grad in stretches.grads]
    backend.step(stretches, None)
    assert_close_to(stretches, expected, rtol=3e-7)  # a few roundings to float32
    assert all(map(torch.equal, stretches.grads, grads)), "gradients are read only"


@every_variant
def test_the_loop_is_exact_in_float64(form, nesterov):
    stretches = random_stretches(form, nesterov, dtype=torch.float64)
    expected = expected_step(stretches)
    lars_loop.step(stretches, None)
    assert_close_to(stretches, expected, rtol=1e-14)


@every_backend
@every_variant
def test_norms_and_update_make_a_step(backend, form, nesterov):
    stretches = random_stretches(form, nesterov)
    whole = clone(stretches)
    backend.step(whole, None)
    backend.update(stretches, backend.squared_norms(stretches), None)
    assert all(map(torch.equal, stretches.params + stretches.buffers, whole.params + whole.buffers))


@every_backend
def test_norms_are_as_exact_as_float64(backend):
    """Of three million numbers whose mean is not zero, where sums in float32 are 5e-5 off."""
    stretches = random_stretches("larc", nesterov=False, shapes=[(3_000_001,)])
    stretches.params[0] += 1
    norms = backend.squared_norms(stretches)
    assert norms.dtype == torch.float64
    expected = [x[0].double().square().sum().item() for x in (stretches.params, stretches.grads)]
    torch.testing.assert_close(norms[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@every_backend
def test_norms_add_up_over_the_stretches_of_a_tensor(backend):
    stretches = random_stretches("larc", nesterov=False, shapes=[(5,), (7,)])
    cut = stretches._replace(tensors=[0, 0, 1, 1, 4, 4], num_tensors=6)
    norms, expected = backend.squared_norms(cut), torch.zeros(6, 2, dtype=torch.float64)
    for p, g, tensor in zip(cut.params, cut.grads, cut.tensors, strict=True):
        expected[tensor] += torch.stack([p.double().square().sum(), g.double().square().sum()])
    adapted = [0, 4]  # what stands in the other rows is of no account, but finite
    torch.testing.assert_close(norms[adapted], expected[adapted], rtol=1e-12, atol=0)
    assert norms.isfinite().all()


@every_backend
@every_variant
def test_a_skipped_step_changes_nothing(backend, form, nesterov):
    stretches = random_stretches(form, nesterov)
    stretches.grads[2][5] = math.nan
    stretches.grads[3].fill_(math.inf)
    before = clone(stretches)
    norms = backend.squared_norms(stretches)
    backend.step(stretches, torch.tensor(True))
    backend.update(stretches, norms, torch.tensor(True))
    assert all(map(torch.equal, stretches.params + stretches.buffers, before.params + before.buffers))

    stretches = random_stretches(form, nesterov)
    taken = clone(stretches)
    backend.step(stretches, torch.tensor(False))
    backend.step(taken, None)
    assert all(map(torch.equal, stretches.params + stretches.buffers, taken.params + taken.buffers))


@every_variant
def test_any_number_of_threads_gives_the_same_bits(form, nesterov, num_threads):
    shapes = [(700, 701), (41,), (300_000,), (1271, 41), *[(1000,)] * 40]
    results = []
    for threads in (1, 2, 3, 4):
        num_threads(threads)
        stretches = random_stretches(form, nesterov, shapes=shapes)
        lars_fused.step(stretches, None)
        norms = lars_fused.squared_norms(stretches)
        lars_fused.update(stretches, norms, None)
        results.append([*stretches.params, *stretches.buffers, norms])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_memory_but_the_stretches_is_written():
    """Stretches at odd addresses inside of one buffer, with NaN between them."""
    memory = torch.full((3, 4000), math.nan)
    stretches = random_stretches("classic", nesterov=True, shapes=[(n,) for n in (1, 17, 401, 1271)])
    expected, outside = expected_step(stretches), torch.ones(3, 4000, dtype=torch.bool)
    start = 1
    for i, param in enumerate(stretches.params):
        for row, tensors in enumerate(stretches[:3]):
            inside = slice(start + row, start + row + param.numel())
            tensors[i] = memory[row, inside].copy_(tensors[i])
            outside[row, inside] = False
        start += param.numel() + 5
    lars_fused.step(stretches, None)
    assert_close_to(stretches, expected, rtol=3e-7)
    assert memory[outside].isnan().all()


def test_the_kernel_is_compiled_anew_when_its_sources_change():
    version = source_hash("train.optim.lars_numba", "train.optim.lars_reference")
    assert version in [cell.cell_contents for cell in kernel().py_func.__closure__]


def test_auto_logs_what_it_chooses_once(caplog):
    lars_backends._choose.cache_clear()
    stretches = random_stretches("classic", nesterov=False)
    with caplog.at_level(logging.INFO, "train.optim.lars_backends"):
        assert [choose_backend("auto", stretches) for _ in range(3)] == [lars_fused] * 3
        assert choose_backend("auto", random_stretches("classic", nesterov=False, dtype=torch.bfloat16)) == lars_loop
    assert caplog.messages == [
        "LARS: backend fused, for parameters that are dense float32 on cpu",
        "LARS: backend reference, for parameters that are dense bfloat16 on cpu",
    ]


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("fused", torch.float64, "needs parameters that are dense float32 on cpu, got dense float64 on cpu"),
        ("triton", torch.float32, "needs parameters that are dense .* on cuda, got dense float32 on cpu"),
        ("apex", torch.float32, "needs parameters that are dense float32 on cuda, got dense float32 on cpu"),
    ],
)
def test_a_backend_that_cannot_be_met_is_refused(backend, dtype, words):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^`optim\.backend` {backend} {words}; set it to auto$"):
        LARS([param], lr=1.0, backend=backend).step()
    assert torch.equal(param.data, torch.ones(3, dtype=dtype))


def test_a_parameter_with_gaps_is_not_for_compiled_code():
    param = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    param.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="got strided float32 on cpu"):
        LARS([param], lr=1.0, backend="fused").step()


def test_a_backend_is_checked_before_there_are_parameters():
    check_backend("auto", "classic", torch.device("cuda"))
    check_backend("fused", "larc", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^`optim\.backend` triton needs .* on cuda, got dense float32 on cpu"):
        check_backend("triton", "classic", torch.device("cpu"))


@every_backend
@pytest.mark.parametrize("form", ["classic", "non_classic", "larc"])
def test_a_gradient_next_to_nothing_leaves_the_weights_finite(backend, form):
    """Its norm is none in float32, and the ratio to it no number there."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.zeros(64, 64)
    weight.grad[0] = 1e-41
    name = next(name for name, module in BACKENDS.items() if module is backend)
    optimizer = LARS([weight], lr=4.8, weight_decay=0.0, form=form, backend=name)
    optimizer.step()
    assert torch.equal(weight, torch.ones(64, 64))


FORK = """
import os, torch
from train.optim.lars import LARS
torch.set_num_threads(3)
weights = [torch.nn.Parameter(torch.ones(2**19)) for _ in range(3)]
for weight in weights:
    weight.grad = torch.ones_like(weight)
optimizer = LARS(weights, lr=1.0, backend="fused")
optimizer.step()
child = os.fork()
optimizer.step()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_goes_on():
    """The threads of its parent are not there."""
    command = [sys.executable, "-c", FORK]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
