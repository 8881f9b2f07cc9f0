"""NT-Xent in one process: hand-worked numbers, google's form, float64 autograd on the formula, memory."""

import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.ntxent import loss as ntxent_loss
from model.ntxent import tiled
from model.ntxent.autograd import NTXentFunction, Settings
from model.ntxent.loss import nt_xent


def projections(num_images, dim, dtype=torch.float64, seed=0):
    """Two views, rows of many lengths; positives at a cosine of about 0.4, which some negatives exceed."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_images, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, num_images, dim, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, num_images, 1, generator=generator, dtype=torch.float64) + 0.5
    z1, z2 = ((common + 1.2 * noise) * lengths).to(dtype)
    return z1.requires_grad_(), z2.requires_grad_()


def in_tiles(z1, z2, *, temperature, normalize=True, group=None, exchange="all_gather", tile_size):
    """The tiled backend with tiles of a side of our choice."""
    walk = SimpleNamespace(
        scan=partial(tiled.scan, tile_size=tile_size), gradient=partial(tiled.gradient, tile_size=tile_size)
    )
    return NTXentFunction.apply(z1, z2, temperature, Settings(normalize, group, exchange, walk))


def gradients(loss, *inputs, upstream=1.0):
    return torch.autograd.grad(loss, inputs, torch.tensor(upstream, dtype=loss.dtype))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_hand_worked_numbers(backend):
    # Rows a = (3, 0), b = (0, 2); their other views a' = (4, 3), b' = (−3, 4). Cosines: aa' = bb' = 0.8,
    # ab = a'b' = 0, ab' = −0.6, ba' = 0.6. With τ = 0.5 the similarities are twice that, so
    #   ℓ_a = ℓ_b' = log((e^1.6 + e^0 + e^−1.2) / e^1.6) = log(6.2542266 / 4.9530324) = 0.2332575
    #   ℓ_b = ℓ_a' = log((e^1.6 + e^0 + e^1.2)  / e^1.6) = log(9.2731493 / 4.9530324) = 0.6271231
    # and Eq. 1 is their mean. Each positive (0.8) beats each negative (0.6 at most).
    z1 = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    z2 = torch.tensor([[4.0, 3.0], [-3.0, 4.0]], dtype=torch.float64)
    loss, accuracy = nt_xent(z1, z2, temperature=0.5, backend=backend)
    assert loss.item() == pytest.approx((0.2332575 + 0.6271231) / 2, abs=1e-7)
    assert accuracy.item() == 1.0
    # With b' = (2, −1), ab' = 0.89 beats aa', and bb' = −0.45 is the least of all; a' alone still prefers a.
    z2[1] = torch.tensor([2.0, -1.0])
    assert nt_xent(z1, z2, temperature=0.5, backend=backend).contrastive_accuracy.item() == 0.25


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_half_of_googles_form(backend):
    """`tf2/objective.py` sums two cross-entropies over [ab, aa] and [ba, bb], each a mean over N."""
    z1, z2 = projections(41, 16)
    a, b, tau = F.normalize(z1), F.normalize(z2), 0.1
    mask = torch.eye(41, dtype=torch.float64) * 1e9
    labels = torch.arange(41)
    google = F.cross_entropy(torch.cat((a @ b.T / tau, a @ a.T / tau - mask), 1), labels)
    google = google + F.cross_entropy(torch.cat((b @ a.T / tau, b @ b.T / tau - mask), 1), labels)
    loss = nt_xent(z1, z2, temperature=tau, backend=backend).loss
    torch.testing.assert_close(2 * loss, google, rtol=1e-13, atol=0)
    for ours, theirs in zip(gradients(loss, z1, z2, upstream=2.0), gradients(google, z1, z2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("num_images", "dim", "tile_size"), [(1, 5, 512), (2, 3, 1), (41, 7, 16), (401, 33, 100), (1271, 8, 512)]
)
def test_tiled_equals_the_formula(num_images, dim, tile_size, temperature, normalize):
    z1, z2 = projections(num_images, dim)
    options = {"temperature": temperature, "normalize": normalize}
    loss, accuracy = in_tiles(z1, z2, **options, tile_size=tile_size)
    expected, expected_accuracy = nt_xent(z1, z2, **options, backend="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert accuracy == expected_accuracy
    ours = gradients(loss, z1, z2, upstream=-2.5)
    theirs = gradients(expected, z1, z2, upstream=-2.5)
    # Similarities reach 1/τ (more without normalisation) and round to 2e-16 of themselves.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 / temperature / num_images)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    def loss(z1, z2):
        return in_tiles(z1, z2, temperature=0.3, normalize=normalize, tile_size=3)[0]

    assert torch.autograd.gradcheck(loss, projections(7, 4))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_float32_is_exact_to_its_rounding(temperature):
    """A similarity, at most 1/τ, carries a rounding error of a few fp32 ulps; so do the log-sum-exps."""
    z1, z2 = projections(401, 128, torch.float32)
    wide1, wide2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    loss, accuracy = nt_xent(z1, z2, temperature=temperature)
    expected, expected_accuracy = nt_xent(wide1, wide2, temperature=temperature, backend="reference")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=4 * 1.2e-7 / temperature)
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    ours = torch.cat(gradients(loss, z1, z2)).double()
    theirs = torch.cat(gradients(expected, wide1, wide2))
    assert (ours - theirs).norm() / theirs.norm() < 4 * 1.2e-7 / temperature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_similarities_stay_exact(dtype):
    """At τ = 0.01 fp32 can hold neither e^(1/τ) nor e^(−1/τ)."""
    z1 = torch.eye(4, dtype=dtype).requires_grad_()
    z2 = (-z1).detach().requires_grad_()  # each positive is the row's least similar: ℓ = log((6 + e^−100)/e^−100)
    loss = nt_xent(z1, z2, temperature=0.01).loss
    assert loss.item() == pytest.approx(100 + math.log(6), rel=1e-6)
    assert all(g.isfinite().all() for g in gradients(loss, z1, z2))
    # Positives alike: ℓ = log(1 + 6 e^(−1/τ)), which the difference L_i − s_ip(i) would round to 0.
    assert nt_xent(z1, z1, temperature=0.02).loss.item() == pytest.approx(6 * math.exp(-50), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    z1, z2 = projections(41, 16, dtype)
    wide1, wide2 = (z.detach().float().requires_grad_() for z in (z1, z2))
    loss = nt_xent(z1, z2, temperature=0.1).loss
    expected = nt_xent(wide1, wide2, temperature=0.1).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for ours, theirs in zip(gradients(loss, z1, z2), gradients(expected, wide1, wide2), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_changes_nothing(backend):
    z1, z2 = projections(41, 16, torch.float32)
    expected = nt_xent(z1, z2, temperature=0.1, backend=backend)
    expected_gradients = gradients(expected.loss, z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        output = nt_xent(z1, z2, temperature=0.1, backend=backend)
        if backend == "tiled":  # its backward, too, may stand inside
            output_gradients = gradients(output.loss, z1, z2)
    if backend == "reference":
        output_gradients = gradients(output.loss, z1, z2)
    assert torch.equal(torch.stack(output), torch.stack(expected))
    assert all(map(torch.equal, output_gradients, expected_gradients))


def test_memory_layout_and_repetition_change_nothing():
    z1, z2 = (z.detach() for z in projections(41, 16))
    strided1, strided2 = (torch.stack((z, -z), dim=-1).transpose(0, 1)[..., 0].T for z in (z1, z2))
    assert not strided1.is_contiguous()
    results = []
    for inputs in ((z1, z2), (z1, z2), (strided1, strided2)):
        leaves = [z.requires_grad_() for z in inputs]
        loss = in_tiles(*leaves, temperature=0.1, normalize=True, tile_size=16)[0]
        results.append((loss, *gradients(loss, *leaves)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_zero_rows_have_the_formulas_gradient():
    """Below a norm of 1e-6 the row is divided by 1e-6, and its gradient keeps the part along the row."""
    z1, z2 = (z.detach() for z in projections(5, 4))
    z1[0] = 0
    z2[3] *= 1e-8
    z1.requires_grad_()
    z2.requires_grad_()
    loss = nt_xent(z1, z2, temperature=0.5).loss
    expected = nt_xent(z1, z2, temperature=0.5, backend="reference").loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, z1, z2), gradients(expected, z1, z2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_collapsed_encoder_earns_no_accuracy(backend):
    z = torch.zeros(6, 4)
    z[:, 1] = 2.0
    loss, accuracy = nt_xent(z, z, temperature=0.5, backend=backend)
    assert loss.item() == pytest.approx(math.log(11))  # 11 other rows, all alike
    assert accuracy.item() == 0.0


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return output


def test_no_similarity_matrix_is_ever_built():
    num_images, dim, tile_size = 512, 16, 64
    rows = 2 * num_images

    def largest(run):
        z1, z2 = projections(num_images, dim, torch.float32)
        with LargestTensor() as mode:
            gradients(run(z1, z2), z1, z2)
        return mode.num_elements

    reference = largest(lambda z1, z2: nt_xent(z1, z2, temperature=0.1, backend="reference").loss)
    assert reference == rows * rows  # the probe sees the matrix where there is one
    options = {"temperature": 0.1, "normalize": True, "tile_size": tile_size}
    assert largest(lambda z1, z2: in_tiles(z1, z2, **options)[0]) == rows * dim  # the projections alone


def test_backend_choice_is_logged_once(caplog):
    ntxent_loss._log_choice.cache_clear()
    z1, z2 = projections(3, 2)
    with caplog.at_level(logging.INFO, logger="model.ntxent.loss"):
        nt_xent(z1, z2, temperature=0.1)
        nt_xent(z1, z2, temperature=0.1)
    assert caplog.messages == ["NT-Xent backend: tiled (cpu, 1 ranks)"]


@pytest.mark.parametrize(
    ("z1", "z2", "options", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), {}, r"\[N, D\] alike with N, D ≥ 1, got \(2, 3\) and \(3, 3\)"),
        (torch.ones(3), torch.ones(3), {}, r"got \(3,\) and \(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), {}, r"got \(0, 3\) and \(0, 3\)"),
        (torch.ones(2, 0), torch.ones(2, 0), {}, r"got \(2, 0\) and \(2, 0\)"),
        (torch.ones(2, 3), torch.ones(2, 3), {"exchange": "allgather"}, "`exchange` must be .* got 'allgather'"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), {}, "one of the dtypes .*, got torch.float32 and"),
        (torch.ones(2, 3).int(), torch.ones(2, 3).int(), {}, "dtypes .*, got torch.int32"),
        (torch.ones(2, 3), torch.ones(2, 3), {"temperature": 0.0}, "`temperature` must be .* > 0, got 0.0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"temperature": math.nan}, "`temperature` must .* got nan"),
        (torch.ones(2, 3), torch.ones(2, 3), {"backend": "magic"}, "`backend` must be .* got 'magic'"),
    ],
)
def test_bad_input_is_named(z1, z2, options, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(z1, z2, **{"temperature": 0.1, **options})
