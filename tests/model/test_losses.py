"""NT-Logistic and margin triplet: hand-worked numbers, SimCLR's Table 2, float64 autograd, the formulas of others."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model.losses import every_negative, semi_hard
from model.losses.margin_triplet import Hinge, margin_triplet
from model.losses.nt_logistic import Logistic, nt_logistic
from model.losses.pairs import PairLossFunction, Settings
from model.losses.reference import margin_triplet_reference, nt_logistic_reference
from tests.model.test_ntxent import gradients, projections

LOSSES = {
    "logistic": (nt_logistic, nt_logistic_reference, {"temperature": 0.3}),
    "triplet": (margin_triplet, margin_triplet_reference, {"margin": 0.4}),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)
either_selection = pytest.mark.parametrize("mined", [False, True], ids=["every", "semi_hard"])


def compute(loss, z1, z2, mined, **options):
    function, _, defaults = LOSSES[loss]
    return function(z1, z2, semi_hard=mined, **defaults | options)


def by_the_formula(loss, z1, z2, mined, **options):
    _, reference, defaults = LOSSES[loss]
    return reference(z1, z2, semi_hard=mined, **{"normalize": True} | defaults | options)


def in_tiles(loss, z1, z2, mined, *, tile_size, normalize=True, group=None, exchange="all_gather", **options):
    """As `compute`, with tiles of a side of our choice."""
    options = LOSSES[loss][2] | options
    walk = semi_hard if mined else every_negative
    gradient = walk.gradient if mined else partial(walk.gradient, tile_size=tile_size)
    selection = SimpleNamespace(scan=partial(walk.scan, tile_size=tile_size), gradient=gradient)
    terms = Logistic() if loss == "logistic" else Hinge(options["margin"])
    settings = Settings(terms, selection, normalize, group, exchange)
    temperature = options["temperature"] if loss == "logistic" else 1.0
    return PairLossFunction.apply(z1, z2, temperature, settings)


# Rows a = (3, 0), b = (0, 2); their other views a' = (4, 3), b' = (−3, 4). Cosines: aa' = bb' = 0.8, ab = a'b' = 0,
# ab' = −0.6, ba' = 0.6. So anchors a and b' have the negatives 0 and −0.6, and b and a' have 0 and 0.6.
# Logistic, τ = 0.5: log(1 + e^s) at s = −1.6, −1.2, 0, 1.2 is 0.1839007, 0.2632825, 0.6931472, 1.4632825.
# Triplet: s − 0.8 + m is, for m = 0.9, −0.5 and 0.1, or 0.1 and 0.7; for m = 0.1, 0.5 and 0.7 less than 0, or −0.1.
@pytest.mark.parametrize(
    ("loss", "options", "mined", "expected"),
    [
        ("logistic", {"temperature": 0.5}, False, 0.1839007 + (0.2632825 + 2 * 0.6931472 + 1.4632825) / 4),
        ("logistic", {"temperature": 0.5}, True, 0.1839007 + (0.6931472 + 1.4632825) / 2),
        ("triplet", {"margin": 0.9}, False, ((0.0 + 0.1) / 2 + (0.1 + 0.7) / 2) / 2),
        ("triplet", {"margin": 0.9}, True, (0.1 + 0.7) / 2),
        ("triplet", {"margin": 0.1}, False, 0.0),
    ],
)
@pytest.mark.parametrize("function", [compute, by_the_formula])
def test_hand_worked_numbers(function, loss, options, mined, expected):
    z1 = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    z2 = torch.tensor([[4.0, 3.0], [-3.0, 4.0]], dtype=torch.float64)
    value, accuracy = function(loss, z1, z2, mined, **options)
    assert value.item() == pytest.approx(expected, abs=1e-7)
    assert accuracy.item() == 1.0
    # With b' = (2, −1), ab' = 0.89 beats aa', and bb' = −0.45 is the least of all; a' alone still prefers a.
    z2[1] = torch.tensor([2.0, -1.0])
    assert function(loss, z1, z2, mined, **options)[1].item() == 0.25


@pytest.mark.parametrize("mined", [False, True])
@every_loss
def test_table_2s_gradients(loss, mined):
    """Its third column is −dℓ/du for an anchor u, one positive, one negative, all of unit length.

    Each term is symmetric in the two vectors of a pair: what u receives of v, v receives of u.
    """
    tau, m, num_images = 0.3, 0.4, 6
    z1, z2 = (F.normalize(z.detach()).requires_grad_() for z in projections(num_images, 3))
    z = torch.cat((z1, z2)).detach()
    expected = torch.zeros_like(z)
    for u in range(len(z)):
        positive = (u + num_images) % len(z)
        negatives = [v for v in range(len(z)) if v not in {u, positive}]
        s = {v: z[u] @ z[v] for v in range(len(z))}
        if mined:
            negatives = sorted((v for v in negatives if s[v] < s[positive]), key=lambda v: -s[v])[:1]
        share = 1 if mined else 1 / (len(z) - 2)
        pulls = dict.fromkeys(s, 0.0)  # of the gradient in Table 2: how much of v
        if loss == "logistic":
            pulls[positive] += torch.sigmoid(-s[positive] / tau) / tau
        for v in negatives:
            if loss == "logistic":
                pulls[v] -= share * torch.sigmoid(s[v] / tau) / tau
            elif s[positive] - s[v] < m:
                pulls[positive] += share
                pulls[v] -= share
        for v, pull in pulls.items():
            expected[u] -= pull * z[v] / len(z)
            expected[v] -= pull * z[u] / len(z)
    value = compute(loss, z1, z2, mined, normalize=False).loss
    torch.testing.assert_close(torch.cat(gradients(value, z1, z2)), expected, rtol=1e-12, atol=1e-15)


@every_loss
@either_selection
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("num_images", "dim", "tile_size"), [(1, 5, 512), (2, 3, 1), (41, 7, 16), (401, 33, 100), (600, 8, 512)]
)
def test_tiles_equal_the_formula(num_images, dim, tile_size, normalize, mined, loss):
    z1, z2 = projections(num_images, dim)
    inputs, options = [z1, z2], {"normalize": normalize}
    if loss == "logistic":
        options["temperature"] = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        inputs.append(options["temperature"])
    value, accuracy = in_tiles(loss, z1, z2, mined, **options, tile_size=tile_size)
    expected, expected_accuracy = by_the_formula(loss, z1, z2, mined, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert accuracy == expected_accuracy
    ours, theirs = (gradients(x, *inputs, upstream=-2.5) for x in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 / num_images)


@every_loss
@either_selection
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize, mined, loss):
    def run(z1, z2, temperature):
        return in_tiles(loss, z1, z2, mined, temperature=temperature, normalize=normalize, tile_size=3)[0]

    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=loss == "logistic")
    assert torch.autograd.gradcheck(run, (*projections(7, 4), temperature))


def test_pytorch_metric_learning_has_the_same_triplets():
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.reducers import MeanReducer

    theirs = TripletMarginLoss(0.4, distance=CosineSimilarity(), reducer=MeanReducer())
    z1, z2 = projections(23, 8)
    expected = theirs(torch.cat((z1, z2)), torch.arange(23).repeat(2))
    value = margin_triplet(z1, z2, margin=0.4).loss
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, others in zip(gradients(value, z1, z2), gradients(expected, z1, z2), strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-9, atol=1e-15)


def test_semi_hard_triplets_of_tensorflow_addons():
    """`triplet_semihard_loss` of its losses/triplet.py with "squared-L2": d² = 2 − 2s, hence twice the margin.

    It falls back to the farthest negative for an anchor without a semi-hard one; here every anchor has one.
    """
    z1, z2 = projections(23, 8)
    z = F.normalize(torch.cat((z1, z2)))
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
    labels = torch.arange(23).repeat(2)
    others = labels[:, None] != labels
    positive = distance[torch.arange(46), torch.arange(46).roll(23)]
    outside = others & (distance > positive[:, None])
    assert outside.any(1).all()
    negative = distance.masked_fill(~outside, math.inf).amin(1)
    expected = F.relu(2 * 0.4 + positive - negative).mean()
    value = margin_triplet(z1, z2, margin=0.4, semi_hard=True).loss
    torch.testing.assert_close(2 * value, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(value, z1, z2, upstream=2.0), gradients(expected, z1, z2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_logistic_is_binary_cross_entropy():
    z1, z2 = projections(23, 8)
    z = F.normalize(torch.cat((z1, z2)))
    logits = z @ z.T / 0.3
    row, positive = torch.arange(46), torch.arange(46).roll(23)
    negatives = (row != row[:, None]) & (row != positive[:, None])
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(logits[row, positive], torch.ones(46).double())
    expected = expected + cross_entropy(logits[negatives], torch.zeros(46 * 44).double())
    torch.testing.assert_close(nt_logistic(z1, z2, temperature=0.3).loss, expected, rtol=1e-12, atol=0)


@every_loss
@either_selection
def test_float32_is_exact_to_its_rounding(mined, loss):
    z1, z2 = projections(401, 128, torch.float32)
    wide1, wide2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    value, accuracy = compute(loss, z1, z2, mined)
    expected, expected_accuracy = by_the_formula(loss, wide1, wide2, mined)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=4e-7)
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    ours = torch.cat(gradients(value, z1, z2)).double()
    theirs = torch.cat(gradients(expected, wide1, wide2))
    assert (ours - theirs).norm() / theirs.norm() < 2e-6  # here no choice and no hinge stands within rounding


def test_extreme_similarities_stay_exact():
    """At τ = 0.01 fp32 can hold neither e^(1/τ) nor e^(−1/τ)."""
    z = torch.eye(4).requires_grad_()  # all negatives at right angles: log(1 + e^0)
    for other, positive in ((-z.detach(), 100.0), (z.detach(), 0.0)):
        value = nt_logistic(z, other, temperature=0.01).loss
        assert value.item() == pytest.approx(positive + math.log(2), rel=1e-6)
        assert gradients(value, z)[0].isfinite().all()
