"""NT-Logistic and margin triplet on inputs of every kind: dtypes, layouts, ties, collapse, zeros, NaN; their memory."""

import math
from functools import partial

import pytest
import torch

from model.losses.margin_triplet import margin_triplet
from model.losses.nt_logistic import nt_logistic
from tests.model.test_losses import by_the_formula, compute, either_selection, every_loss, in_tiles
from tests.model.test_ntxent import LargestTensor, gradients, projections


@every_loss
@either_selection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype, mined, loss):
    z1, z2 = projections(41, 16, dtype)
    wide1, wide2 = (z.detach().float().requires_grad_() for z in (z1, z2))
    value, expected = compute(loss, z1, z2, mined).loss, compute(loss, wide1, wide2, mined).loss
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for ours, theirs in zip(gradients(value, z1, z2), gradients(expected, wide1, wide2), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@every_loss
@either_selection
def test_autocast_memory_layout_and_repetition_change_nothing(mined, loss):
    z1, z2 = (z.detach() for z in projections(41, 16, torch.float32))
    strided1, strided2 = (torch.stack((z, -z), dim=-1).transpose(0, 1)[..., 0].T for z in (z1, z2))
    assert not strided1.is_contiguous()
    results = []
    for views, autocast in (((z1, z2), False), ((z1, z2), False), ((z1, z2), True), ((strided1, strided2), False)):
        leaves = [z.requires_grad_() for z in views]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # the backward, too, may stand inside
            output = compute(loss, *leaves, mined)
            results.append((*output, *gradients(output.loss, *leaves)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a compiled graph ends
@every_loss
def test_it_works_inside_a_compiled_function(loss):
    z1, z2 = projections(9, 4)

    def scaled(z1, z2):
        return 3 * compute(loss, 2 * z1, 2 * z2, False, normalize=False).loss

    value, expected = torch.compile(scaled, backend="aot_eager")(z1, z2), scaled(z1, z2)
    assert torch.equal(value, expected)
    torch.testing.assert_close(gradients(value, z1, z2), gradients(expected, z1, z2), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [4, 128, 2048])
def test_a_collapsed_encoder_is_all_ties(dim, dtype):
    """Equal rows have equal similarities to rounding only; no positive is closer than a negative, and none farther."""
    torch.manual_seed(0)
    z = torch.randn(1, dim, dtype=dtype).expand(300, dim).clone().requires_grad_()
    positive, negative = math.log1p(math.exp(-1 / 0.3)), math.log1p(math.exp(1 / 0.3))
    for loss, mined, expected in (
        ("logistic", False, positive + negative),
        ("logistic", True, positive),
        ("triplet", False, 0.4),
        ("triplet", True, 0.0),
    ):
        value, accuracy = compute(loss, z, z.detach(), mined)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert accuracy.item() == 0.0
        assert gradients(value, z)[0].abs().max() < 1e-6


@every_loss
def test_of_equally_close_negatives_the_first_is_chosen(loss):
    """Integers, whose similarities are exact, in images that repeat: the choice shows in the gradients."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randint(-2, 3, (7, 3), generator=generator).double().repeat(5, 1) for _ in range(2))
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    options = {"margin": 3.0} if loss == "triplet" else {"temperature": 4.0}
    for tile_size in (4, 512):
        value, _ = in_tiles(loss, z1, z2, True, normalize=False, tile_size=tile_size, **options)
        expected, _ = by_the_formula(loss, z1, z2, True, normalize=False, **options)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(value, z1, z2), gradients(expected, z1, z2), rtol=1e-12, atol=1e-12)


def test_an_anchor_without_a_semi_hard_negative_has_no_negative_term():
    z1 = torch.eye(4).requires_grad_()
    z2 = -z1.detach()  # each positive is the row's least similar
    value = nt_logistic(z1, z2, temperature=0.5, semi_hard=True).loss
    assert value.item() == pytest.approx(math.log1p(math.exp(2)))
    # 1/8 of ℓ_i for each of the two rows of an image: −σ(2)/τ·z_p(i); along the row it is lost in the normalisation.
    value = nt_logistic(z1, z2, temperature=0.5, semi_hard=True, normalize=False).loss
    torch.testing.assert_close(gradients(value, z1)[0], -2 / 8 * torch.sigmoid(torch.tensor(2.0)) / 0.5 * z2)
    value = margin_triplet(z1, z2, semi_hard=True, normalize=False).loss
    assert value.item() == 0.0
    assert not gradients(value, z1)[0].any()


@either_selection
def test_a_triplet_at_the_margin_itself_pulls_at_nothing(mined):
    z1 = torch.eye(4).requires_grad_()
    value = margin_triplet(z1, z1.detach(), margin=1.0, normalize=False, semi_hard=mined).loss
    assert value.item() == 0.0
    assert not gradients(value, z1)[0].any()


@every_loss
@either_selection
def test_zero_rows_have_the_formulas_gradient(mined, loss):
    """Below a norm of 1e-6 the row is divided by 1e-6, and its gradient keeps the part along the row."""
    z1, z2 = (z.detach() for z in projections(5, 4))
    z1[0] = 0
    z2[3] *= 1e-8
    leaves = z1.requires_grad_(), z2.requires_grad_()
    value, expected = compute(loss, *leaves, mined).loss, by_the_formula(loss, *leaves, mined)[0]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(value, *leaves), gradients(expected, *leaves), rtol=1e-9, atol=1e-12)


@every_loss
@either_selection
def test_a_nan_is_never_hidden(mined, loss):
    z1, z2 = (z.detach() for z in projections(5, 4))
    z2[3, 1] = math.nan
    assert compute(loss, z1, z2, mined).loss.isnan()


@every_loss
@either_selection
def test_no_similarity_matrix_is_ever_built(mined, loss):
    num_images, dim = 512, 16
    rows = 2 * num_images

    def largest(run):
        z1, z2 = projections(num_images, dim, torch.float32)
        with LargestTensor() as mode:
            gradients(run(loss, z1, z2, mined)[0], z1, z2)
        return mode.num_elements

    assert largest(by_the_formula) == rows * rows  # the probe sees the matrix where there is one
    assert largest(partial(in_tiles, tile_size=64)) == rows * dim  # the projections alone


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda z: nt_logistic(z, z[:1], temperature=0.1), r"\[N, D\] alike .* got \(2, 3\) and \(1, 3\)"),
        (lambda z: nt_logistic(z, z, temperature=0.0), "`temperature` must be a finite number > 0, got 0.0"),
        (lambda z: nt_logistic(z, z, temperature=0.1, exchange="star"), "`exchange` must be .* got 'star'"),
        (lambda z: margin_triplet(z.int(), z.int()), "one of the dtypes .*, got torch.int32"),
        (lambda z: margin_triplet(z, z, margin=-0.1), "`margin` must be a finite number ≥ 0, got -0.1"),
        (lambda z: margin_triplet(z, z, margin=math.nan), "`margin` must be a finite number ≥ 0, got nan"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run(torch.ones(2, 3))
