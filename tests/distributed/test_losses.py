"""NT-Logistic and margin triplet on 1, 2, 3 and 4 ranks against the formulas on the whole batch in one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.losses.contrastive import ContrastiveLoss
from model.losses.margin_triplet import margin_triplet
from model.losses.reference import nt_logistic_reference
from tests.distributed.ranks import run_ranks
from tests.model.test_losses import LOSSES, by_the_formula, compute, in_tiles
from tests.model.test_ntxent import gradients, projections

pytestmark = pytest.mark.distributed

NUM_IMAGES = 21  # of each rank: several tiles of 8, the last of them ragged
GROUPS = ([3], [1, 3], [1, 2, 3], [0, 1, 2, 3])
EXCHANGES = ("all_gather", "ring")


def test_ranks_equal_one_big_batch():
    run_ranks(check_everything, 4)


def check_everything(rank):
    """In one start of the processes; groups of 1 to 4 of them stand for so many ranks."""
    for ranks in GROUPS:
        group = dist.new_group(ranks)  # all four must call, members or not
        if rank in ranks:
            for loss, mined, exchange in product(LOSSES, (False, True), EXCHANGES):
                check_loss_and_gradients(loss, mined, exchange, group)
                check_float32(loss, mined, exchange, group)
            for loss, exchange in product(LOSSES, EXCHANGES):
                check_ties_between_ranks(loss, exchange, group)
    for loss, mined in product(LOSSES, (False, True)):
        check_the_backward_of_all_gather_is_silent(loss, mined, rank)
    for exchange in EXCHANGES:
        check_parameter_gradients_average(exchange)
    check_unequal_rows_are_refused(rank)


def check_loss_and_gradients(loss, mined, exchange, group):
    world_size, own = collectives.world_size(group), own_rows(group)
    z1, z2 = projections(world_size * NUM_IMAGES, 16)
    for normalize in (True, False):
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=loss == "logistic")
        options = {"normalize": normalize}
        if loss == "logistic":
            options["temperature"] = temperature
        own1, own2 = (z.detach()[own].requires_grad_() for z in (z1, z2))
        value, accuracy = in_tiles(loss, own1, own2, mined, **options, group=group, exchange=exchange, tile_size=8)
        expected, expected_accuracy = by_the_formula(loss, z1, z2, mined, **options)
        for ours, whole in ((value, expected), (accuracy, expected_accuracy)):
            torch.testing.assert_close(mean_over_ranks(ours, group), whole.detach(), rtol=1e-12, atol=1e-12)
        learned = [temperature] if loss == "logistic" else []
        ours = gradients(value, own1, own2, *learned, upstream=-2.5)
        theirs = gradients(expected, z1, z2, *learned, upstream=-2.5)
        # Averaging over ranks divides by their number: each holds that many times the global gradient.
        for gradient, whole in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(gradient / world_size, whole[own], rtol=0, atol=1e-12)
        for gradient, whole in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(mean_over_ranks(gradient, group), whole, rtol=1e-11, atol=0)


def check_float32(loss, mined, exchange, group):
    world_size, own = collectives.world_size(group), own_rows(group)
    z1, z2 = projections(world_size * NUM_IMAGES, 16, torch.float32)
    own1, own2 = (z.detach()[own].requires_grad_() for z in (z1, z2))
    value = compute(loss, own1, own2, mined, group=group, exchange=exchange).loss
    expected, _ = by_the_formula(loss, z1, z2, mined)
    torch.testing.assert_close(mean_over_ranks(value, group), expected.detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(value, own1, own2), gradients(expected, z1, z2), strict=True):
        torch.testing.assert_close(ours / world_size, theirs[own], rtol=0, atol=1e-6)


def check_ties_between_ranks(loss, exchange, group):
    """Every rank has the same images, of integers, whose similarities are exact: each looks for the same first one."""
    world_size, own = collectives.world_size(group), own_rows(group)
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (
        torch.randint(-2, 3, (NUM_IMAGES, 3), generator=generator).double().repeat(world_size, 1).requires_grad_()
        for _ in range(2)
    )
    options = {"margin": 3.0} if loss == "triplet" else {"temperature": 4.0}
    own1, own2 = (z.detach()[own].requires_grad_() for z in (z1, z2))
    value, _ = in_tiles(loss, own1, own2, True, normalize=False, **options, group=group, exchange=exchange, tile_size=8)
    # In the order of the ranks' rows, not of the whole batch's: rank by rank, view 1, then view 2.
    order = torch.arange(world_size * NUM_IMAGES).view(world_size, NUM_IMAGES)
    rows = torch.cat((order, order + world_size * NUM_IMAGES), dim=1).flatten()
    expected = first_semi_hard(loss, torch.cat((z1, z2))[rows], **options)
    torch.testing.assert_close(mean_over_ranks(value, group), expected.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(value, own1, own2), gradients(expected, z1, z2), strict=True):
        torch.testing.assert_close(ours / world_size, theirs[own], rtol=0, atol=1e-12)


def first_semi_hard(loss, z, margin=None, temperature=None):
    """The mined losses of rows z in the order of the ranks', by argmax, which gives the first of equal ones."""
    row = torch.arange(len(z))
    block, place = row // (2 * NUM_IMAGES), row % (2 * NUM_IMAGES)
    positive_of = block * 2 * NUM_IMAGES + (place + NUM_IMAGES) % (2 * NUM_IMAGES)
    s = z @ z.T
    positive = s[row, positive_of]
    outside = (row == row[:, None]) | (row == positive_of[:, None]) | (s >= positive[:, None])
    chosen = s.detach().masked_fill(outside, -torch.inf).argmax(1)
    found = ~outside[row, chosen]
    if loss == "triplet":
        return (found * (s[row, chosen] - positive + margin).relu()).mean()
    softplus = torch.nn.functional.softplus
    return (softplus(-positive / temperature, threshold=99) + found * softplus(s[row, chosen] / temperature)).mean()


def check_the_backward_of_all_gather_is_silent(loss, mined, rank):
    """Rank 0 alone runs it: a collective would wait for the others until time runs out."""
    z1, z2 = projections(NUM_IMAGES, 16, seed=rank)
    value = compute(loss, z1, z2, mined).loss
    if rank == 0:
        assert gradients(value, z1, z2)[0].any()


def check_parameter_gradients_average(exchange):
    """Data parallelism: the ranks' gradients of a shared layer and of τ, averaged, are those of all rows together."""
    module = ContrastiveLoss(name="nt_logistic", temperature=0.3, learn_temperature=True, exchange=exchange)
    x1, x2 = projections(4 * NUM_IMAGES, 16)
    weight = projections(8, 16, seed=1)[0]
    log_temperature = module.log_temperature.detach().clone().requires_grad_()
    options = {"temperature": log_temperature.exp(), "normalize": True, "semi_hard": False}
    expected, _ = nt_logistic_reference(x1 @ weight.T, x2 @ weight.T, **options)
    expected_gradients = gradients(expected, weight, log_temperature)
    own = own_rows(None)
    loss, metrics = module(x1[own] @ weight.T, x2[own] @ weight.T)
    for ours, theirs in zip(gradients(loss, weight, module.log_temperature), expected_gradients, strict=True):
        torch.testing.assert_close(mean_over_ranks(ours, None), theirs, rtol=1e-6, atol=1e-8)  # τ is fp32
    assert metrics["temperature"].item() == pytest.approx(0.3)


def check_unequal_rows_are_refused(rank):
    z = torch.ones(2 + rank % 2, 3)
    with pytest.raises(ValueError, match=r"the same number of rows, got \[2, 3, 2, 3\] in rank order"):
        margin_triplet(z, z)


def own_rows(group):
    rank = collectives.rank(group)
    return slice(rank * NUM_IMAGES, (rank + 1) * NUM_IMAGES)


def mean_over_ranks(value, group):
    return collectives.all_reduce_sum_(value.detach().clone(), group) / collectives.world_size(group)
