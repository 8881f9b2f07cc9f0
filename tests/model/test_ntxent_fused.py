"""The fused CPU backend against float64: the formula, blocks of other ranks, extremes, threads, other processors."""

import math
import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from model.ntxent import fused, tiled
from model.ntxent.loss import nt_xent
from tests.model.test_ntxent import gradients, projections

EPS = 1.2e-7  # of float32
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def num_threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def scaled(num_rows, dim, longest, seed=0):
    """Rows u of up to a length, so that |s| ≤ longest²."""
    u = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return u * (longest / u.norm(dim=1).max())


def test_hand_worked_numbers():
    # As in test_ntxent.py: cosines aa' = bb' = 0.8, ab = a'b' = 0, ab' = −0.6, ba' = 0.6, doubled by τ = 0.5.
    z1, z2 = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0], [-3.0, 4.0]])
    loss, accuracy = nt_xent(z1, z2, temperature=0.5, backend="fused")
    assert loss.item() == pytest.approx((0.2332575 + 0.6271231) / 2, abs=1e-7)
    assert accuracy.item() == 1.0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize(("num_images", "dim"), [(1, 1), (1, 5), (2, 3), (41, 7), (401, 33), (1271, 128), (300, 1)])
def test_equals_the_formula(num_images, dim, temperature, normalize):
    """To the rounding of the similarities, of which the largest has that of a few ulps."""
    z1, z2 = projections(num_images, dim, torch.float32)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    options = {"temperature": temperature, "normalize": normalize}
    loss, accuracy = nt_xent(z1, z2, **options, backend="fused")
    expected, expected_accuracy = nt_xent(*wide, **options, backend="tiled")
    largest = (1.0 if normalize else torch.cat(wide).norm(dim=1).max().item() ** 2) / temperature
    error = 4 * EPS * (1 + largest)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=error)
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    ours = torch.cat(gradients(loss, z1, z2, upstream=-2.5)).double()
    theirs = torch.cat(gradients(expected, *wide, upstream=-2.5))
    # A normalised row of one number has no gradient: rounding is all there is.
    slack = error if dim == 1 and normalize else 1e-30
    assert (ours - theirs).norm() <= error * theirs.norm() + slack


@pytest.mark.parametrize("backend", ["fused", "tiled"])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5])
def test_errors_are_float32s_rounding(backend, temperature):
    z1, z2 = projections(512, 128, torch.float32)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    loss = nt_xent(z1, z2, temperature=temperature, backend=backend).loss
    expected = nt_xent(*wide, temperature=temperature, backend="reference").loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = torch.cat(gradients(loss, z1, z2)).double(), torch.cat(gradients(expected, *wide))
    assert (ours - theirs).norm() / theirs.norm() < EPS * (2 + 0.2 / temperature)


@pytest.mark.parametrize("longest", [1.0, 6.0, 30.0])  # |s| up to 1, 36 (one bound) and 900 (a maximum each)
@pytest.mark.parametrize(("num_images", "dim"), [(2, 3), (41, 16), (401, 40)])
@pytest.mark.parametrize("first", [0, 1, None])
def test_blocks_of_ranks(first, num_images, dim, longest):
    """This rank's rows against the rows of three, as gathered, or of two others, as they come round the ring."""
    num_rows = 2 * num_images
    everyone = scaled(3 * num_rows, dim, longest)
    rows = everyone[(first or 0) * num_rows :][:num_rows]
    columns, start = (everyone[num_rows:], None) if first is None else (everyone, first * num_rows)
    lse, hardest = fused.scan(rows, columns, start)
    expected_lse, expected_hardest = tiled.scan(rows.double(), columns.double(), start)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6 * longest**2)
    torch.testing.assert_close(hardest.double(), expected_hardest, rtol=2e-6, atol=2e-6 * longest**2)
    row_lse, column_lse = expected_lse, (columns.double() @ rows.double().T).logsumexp(1)  # no s exceeds an L
    if first is not None:
        column_lse[start : start + num_rows] = row_lse
    sums = fused.gradient(rows, columns, row_lse.float(), column_lse.float(), start)
    expected = tiled.gradient(*(t.double() for t in (rows, columns, row_lse, column_lse)), start)
    assert (sums - expected).norm() / expected.norm() < 2 * EPS * (4 + longest**2)


def test_one_bound_and_a_maximum_each_agree(monkeypatch):
    u = scaled(802, 24, 3.0)
    results = []
    for bound in (fused.SAFE_BOUND, 0.0):
        monkeypatch.setattr(fused, "SAFE_BOUND", bound)
        lse, hardest = fused.scan(u, u, 0)
        results.append((lse, hardest, fused.gradient(u, u, lse, lse, 0)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
    assert not torch.equal(results[0][0], results[1][0])  # they are two ways


def test_no_row_is_lost_to_underflow():
    """The s of short rows are near 0, far below those of long ones: to what suits those, all theirs would vanish."""
    lengths = torch.logspace(-2, 1.5, 300)[:, None]
    z1, z2 = (scaled(300, 8, 1.0, seed) * lengths for seed in (1, 2))
    for sign in (1, -1):  # with −1, all positives lie far below the negatives
        pair = [z.clone().requires_grad_() for z in (z1, sign * z1.abs() + 0.01 * z2)]
        wide = [z.detach().double().requires_grad_() for z in pair]
        loss = nt_xent(*pair, temperature=0.5, normalize=False, backend="fused").loss
        expected = nt_xent(*wide, temperature=0.5, normalize=False, backend="reference").loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        ours, theirs = (torch.cat(gradients(*each)) for each in ((loss, *pair), (expected, *wide)))
        error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
        assert error.max() < 1e-3  # the largest s, 2000, has an error of 1e-4, and so have its exponentials
        assert error.median() < 1e-5


@pytest.mark.parametrize("longest", [3.0, 30.0])
def test_threads_and_repetition_change_nothing(longest, num_threads):
    u, others = scaled(1402, 20, longest), scaled(1402, 20, longest, seed=1)
    results = []
    for threads in (1, 2, 3, 4, 4):
        num_threads(threads)
        for columns, first in ((u, 0), (others, None)):
            lse, hardest = fused.scan(u, columns, first)
            column_lse = lse if first == 0 else fused.scan(columns, u, None)[0]
            results.append((lse, hardest, fused.gradient(u, columns, lse, column_lse, first)))
    for i, result in enumerate(results[2:]):
        assert all(map(torch.equal, result, results[i % 2]))


def test_memory_layout_changes_nothing():
    u = scaled(82, 32, 3.0)
    strided = torch.stack((u, -u), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    lse, hardest = fused.scan(u, u, 0)
    assert all(map(torch.equal, fused.scan(strided, strided, 0), (lse, hardest)))
    gradient = fused.gradient(u, u, lse, lse, 0)
    assert torch.equal(fused.gradient(strided, strided, lse, lse, 0), gradient)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_images", [1, 2, 300])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_what_is_not_finite_gives_no_finite_loss(number, num_images, normalize, temperature):
    z1, z2 = projections(num_images, 6, torch.float32)
    bad = z1.detach().clone()
    bad[num_images // 2, 3] = number
    for pair in ((bad, z2.detach()), (z2.detach(), bad)):
        assert not nt_xent(*pair, temperature=temperature, normalize=normalize, backend="fused").loss.isfinite()


@pytest.mark.parametrize("dim", [3, 128])
@pytest.mark.parametrize("num_images", [2, 41, 300])
def test_a_collapsed_encoder_earns_no_accuracy(num_images, dim):
    for temperature in (0.01, 0.1, 1.0):
        z = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)).repeat(num_images, 1)
        loss, accuracy = nt_xent(z, z, temperature=temperature, backend="fused")
        assert loss.item() == pytest.approx(math.log(2 * num_images - 1), rel=1e-5)
        assert accuracy.item() == 0.0


def test_memory_is_that_of_the_rows():
    u = scaled(4096, 64, 3.0)
    lse, _ = fused.scan(u, u, 0)
    for call in (lambda: fused.scan(u, u, 0), lambda: fused.gradient(u, u, lse, lse, 0)):
        call()  # compiled before it is measured
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * u.nbytes  # all similarities would take 64 times as much


def test_an_error_in_a_thread_reaches_the_caller(num_threads):
    num_threads(2)

    def work(tile, _):
        if tile[:3:2] == (256, 512):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        fused._walk(1024, True, work)


def test_every_pair_is_met_once():
    for own in (True, False):
        met = torch.zeros(600, 600)

        def work(tile, _, met=met):
            r0, r1, c0, c1 = tile
            met[r0:r1, c0:c1] += 1

        fused._walk(600, own, work)
        assert torch.equal(met + met.T * own, torch.ones(600, 600) + own * (met * met.T))


def test_others_are_refused():
    z = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'fused' computes in fp32 on the CPU, got torch\.float64 on cpu"):
        nt_xent(z, z, temperature=0.1, backend="fused")


PROGRAM = """
import os, torch
from model.ntxent import fused, tiled
torch.set_num_threads(2)
u = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))

def check(length, num_rows=600):
    rows = (u * length / u.norm(dim=1).max())[:num_rows]
    lse, hardest = fused.scan(rows, rows, 0)
    wide, wide_hardest = tiled.scan(rows.double(), rows.double(), 0)
    assert (lse - wide).abs().max() < 1e-6 * (1 + length**2)
    assert (hardest - wide_hardest).abs().max() < 1e-6 * (1 + length**2)
    gradient = fused.gradient(rows, rows, lse, lse, 0)
    expected = tiled.gradient(rows.double(), rows.double(), wide, wide, 0)
    assert (gradient - expected).norm() / expected.norm() < 1e-6 * (1 + length**2)

def check_both():
    check(3.0)
    check(30.0)
    check(3.0, 514)  # one row beyond the tiles, and beyond a panel
    check(3.0, 130)

check_both()
"""


FORK = """
u = u.clone()
lse, _ = fused.scan(u, u, 0)
child = os.fork()
again, _ = fused.scan(u, u, 0)
same = (again.numpy() == lse.numpy()).all()
if child == 0:
    os._exit(not same)
assert same
assert os.waitpid(child, 0)[1] == 0
"""


def run(program, **environment):
    arguments = [sys.executable, "-c", program]
    subprocess.run(arguments, check=True, cwd=ROOT, env=os.environ | environment, timeout=200)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_older_processors(processor):
    """AVX2 with a fused multiply-add; SSE2 without."""
    run(PROGRAM, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES="")


def test_a_forked_process_goes_on():
    """Threads do not survive a fork; those of torch's own operations neither, so that none stands in the child."""
    run(PROGRAM + FORK)
