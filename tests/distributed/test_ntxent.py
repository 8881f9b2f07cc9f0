"""NT-Xent on 1, 2 and 4 ranks against the formula on the whole batch in one process."""

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.ntxent.loss import nt_xent
from model.ntxent.reference import nt_xent_reference
from tests.distributed.ranks import run_ranks
from tests.model.test_ntxent import gradients, in_tiles, projections

pytestmark = pytest.mark.distributed

NUM_IMAGES = 41  # of each rank: several tiles of 16, the last of them ragged
GROUPS = ([0], [1], [2], [3], [0, 1], [2, 3], [1, 2, 3], [0, 1, 2, 3])


def test_ranks_equal_one_big_batch():
    run_ranks(check_everything, 4)


def check_everything(rank):
    """In one start of the processes; groups of 1, 2 and 4 of them stand for so many ranks."""
    for ranks in GROUPS:
        group = dist.new_group(ranks)  # all four must call, members or not
        if rank in ranks:
            for exchange in ("all_gather", "ring"):
                check_loss_and_gradient(group, len(ranks), exchange)
                check_float32(group, len(ranks), exchange)
    check_parameter_gradients_average()
    check_the_backward_of_all_gather_is_silent(rank)
    check_reference_is_refused()
    check_unequal_rows_are_refused(rank)


def check_loss_and_gradient(group, world_size, exchange):
    z1, z2 = projections(world_size * NUM_IMAGES, 16)
    own = own_rows(group)
    for temperature, normalize in ((0.01, True), (0.1, True), (1.0, True), (1.0, False)):
        options = {"temperature": temperature, "normalize": normalize}
        own1, own2 = (z.detach()[own].requires_grad_() for z in (z1, z2))
        loss, accuracy = in_tiles(own1, own2, **options, group=group, exchange=exchange, tile_size=16)
        expected, expected_accuracy = nt_xent_reference(z1, z2, **options)
        expected_gradients = gradients(expected, z1, z2, upstream=-2.5)
        for value, whole in ((loss, expected), (accuracy, expected_accuracy)):
            torch.testing.assert_close(mean_over_ranks(value, group), whole, rtol=1e-12, atol=1e-12)
        # Averaging over ranks divides by their number: each holds that many times the global gradient.
        for ours, theirs in zip(gradients(loss, own1, own2, upstream=-2.5), expected_gradients, strict=True):
            torch.testing.assert_close(ours / world_size, theirs[own], rtol=0, atol=1e-12)


def check_float32(group, world_size, exchange):
    z1, z2 = projections(world_size * NUM_IMAGES, 16, torch.float32)
    own = own_rows(group)
    own1, own2 = (z.detach()[own].requires_grad_() for z in (z1, z2))
    loss = nt_xent(own1, own2, temperature=0.1, group=group, exchange=exchange).loss
    expected, _ = nt_xent_reference(z1, z2, temperature=0.1, normalize=True)
    torch.testing.assert_close(mean_over_ranks(loss, group), expected.detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, own1, own2), gradients(expected, z1, z2), strict=True):
        torch.testing.assert_close(ours / world_size, theirs[own], rtol=0, atol=1e-6)


def check_the_backward_of_all_gather_is_silent(rank):
    """Rank 0 alone runs it: a collective would wait for the others until time runs out."""
    z1, z2 = projections(NUM_IMAGES, 16, seed=rank)
    loss = nt_xent(z1, z2, temperature=0.1).loss
    if rank == 0:
        assert gradients(loss, z1, z2)[0].any()


def check_parameter_gradients_average():
    """Data parallelism: the ranks' gradients of a shared layer, averaged, are those of all rows together."""
    x1, x2 = projections(4 * NUM_IMAGES, 16)
    weight = projections(8, 16, seed=1)[0]
    expected, _ = nt_xent_reference(x1 @ weight.T, x2 @ weight.T, temperature=0.1, normalize=True)
    (expected_gradient,) = gradients(expected, weight)
    own = own_rows(None)
    loss = nt_xent(x1[own] @ weight.T, x2[own] @ weight.T, temperature=0.1).loss
    (gradient,) = gradients(loss, weight)
    torch.testing.assert_close(mean_over_ranks(gradient, None), expected_gradient, rtol=1e-12, atol=1e-12)


def check_reference_is_refused():
    with pytest.raises(ValueError, match="backend 'reference' serves one process, got world size 4; use 'tiled'"):
        nt_xent(torch.ones(2, 3), torch.ones(2, 3), temperature=0.1, backend="reference")


def check_unequal_rows_are_refused(rank):
    z = torch.ones(4 * (rank % 2), 3)
    with pytest.raises(ValueError, match=r"the same number of rows, got \[0, 4, 0, 4\] in rank order"):
        nt_xent(z, z, temperature=0.1)
    z = torch.ones(2 + rank % 2, 3)
    with pytest.raises(ValueError, match=r"the same number of rows, got \[2, 3, 2, 3\] in rank order"):
        nt_xent(z, z, temperature=0.1)


def own_rows(group):
    rank = collectives.rank(group)
    return slice(rank * NUM_IMAGES, (rank + 1) * NUM_IMAGES)


def mean_over_ranks(value, group):
    return collectives.all_reduce_sum_(value.detach().clone(), group) / collectives.world_size(group)
