"""What ranks hand each other, all at once or in a ring, and NT-Xent's temperature over both."""

import time
from itertools import product

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.exchange import block_starts, check_exchange, gathered, ring
from model.ntxent.loss import nt_xent
from model.ntxent.reference import nt_xent_reference
from tests.distributed.ranks import PATIENCE_S, run_ranks
from tests.model.test_ntxent import LargestTensor, gradients, projections

GROUPS = ([0], [3], [1, 3], [2, 3], [0, 2, 3], [1, 2, 3], [0, 1, 2, 3])
NUM_IMAGES, DIM = 11, 6


def test_one_process_has_one_block():
    rows = torch.arange(6.0).view(3, 2)
    for block in (gathered((rows,), None), *ring((rows,), None)):
        assert torch.equal(block.tensors[0], rows)
        assert block.first == 0
    assert block_starts(3, "all_gather", None) == block_starts(3, "ring", None) == [0]


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="`exchange` must be 'all_gather' or 'ring', got 'star'"):
        check_exchange("star")


@pytest.mark.distributed
def test_blocks_and_temperatures_of_ranks():
    run_ranks(check_everything, 4)


def check_everything(rank):
    """In one start of the processes; groups of 1 to 4 of them, wherever they begin, stand for so many ranks."""
    for ranks in GROUPS:
        group = dist.new_group(ranks)  # all four must call, members or not
        if rank in ranks:
            check_all_gather(group, ranks)
            check_ring(group, ranks)
            check_rows_are_passed_while_the_caller_computes(group, ranks)
            for exchange, normalize in product(("all_gather", "ring"), (True, False)):
                check_temperature_gradient(exchange, normalize, group)
    check_the_ring_holds_little()


def tensors_of(rank):
    """Of two dtypes and shapes; one of them not contiguous."""
    return torch.arange(12.0).view(4, 3).T + 100 * rank, torch.arange(3) + 10 * rank


def check_all_gather(group, ranks):
    own = tensors_of(dist.get_rank())
    block = gathered(own, group)
    for i, tensor in enumerate(block.tensors):
        assert torch.equal(tensor, torch.cat([tensors_of(rank)[i] for rank in ranks]))
        assert torch.equal(tensor[block.first : block.first + 3], own[i])
    assert block_starts(3, "all_gather", group) == [0]


def check_ring(group, ranks):
    """Own rows first, then those of the rank before, and so on round; each once."""
    place = collectives.rank(group)
    blocks = list(ring(tensors_of(dist.get_rank()), group))
    starts = block_starts(3, "ring", group)
    assert len(blocks) == len(starts) == len(ranks)
    assert sorted(starts) == [3 * i for i in range(len(ranks))]
    for turn, (block, start) in enumerate(zip(blocks, starts, strict=True)):
        sender = ranks[(place - turn) % len(ranks)]
        assert all(map(torch.equal, block.tensors, tensors_of(sender)))
        assert block.first == (0 if turn == 0 else None)
        assert start == 3 * ranks.index(sender)


def check_rows_are_passed_while_the_caller_computes(group, ranks):
    """A block is there before the next has come, which comes in while the generator stands still."""
    blocks = ring(tensors_of(dist.get_rank()), group)
    place = collectives.rank(group)
    if place == 0:
        next(blocks)  # before any other rank has sent a thing
    dist.barrier(group)
    if place != 0:
        next(blocks)
    for turn in range(1, len(ranks)):
        coming, expected = blocks.gi_frame.f_locals["coming"], tensors_of(ranks[(place - turn) % len(ranks)])
        deadline = time.monotonic() + PATIENCE_S
        while not all(map(torch.equal, coming, expected)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        next(blocks)
    assert next(blocks, None) is None


def check_temperature_gradient(exchange, normalize, group):
    world_size, place = collectives.world_size(group), collectives.rank(group)
    own = slice(place * NUM_IMAGES, (place + 1) * NUM_IMAGES)
    z1, z2 = projections(world_size * NUM_IMAGES, DIM)
    for value in (0.05, 0.5):
        temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        expected, _ = nt_xent_reference(z1, z2, temperature=temperature, normalize=normalize)
        (whole,) = gradients(expected, temperature, upstream=-2.5)
        loss = nt_xent(
            z1[own], z2[own], temperature=temperature, normalize=normalize, group=group, exchange=exchange
        ).loss
        (gradient,) = gradients(loss, temperature, upstream=-2.5)
        mean = collectives.all_reduce_sum_(gradient.clone(), group) / world_size
        torch.testing.assert_close(mean, whole, rtol=1e-10, atol=1e-13)


def check_the_ring_holds_little():
    """Of 4 ranks' rows, only one rank's are ever in one tensor."""
    num_images, dim = 12, 64  # so that rows are larger than tiles of their similarities
    one_rank = 2 * num_images * dim
    for exchange, largest in (("all_gather", 4 * one_rank), ("ring", one_rank)):
        z1, z2 = projections(num_images, dim, torch.float32)
        with LargestTensor() as mode:
            gradients(nt_xent(z1, z2, temperature=0.1, exchange=exchange).loss, z1, z2)
        assert mode.num_elements == largest
