"""LARS over partitions on several ranks against float64 in one process; borders run through tensors."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.train.flat_partitions import (
    PADDING,
    PLAIN_SHAPES,
    SHAPES,
    check_parts,
    expected_run,
    partition_run,
    starts_and_grads,
)
from tests.train.lars_cases import VARIANTS

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    results = run_ranks(every_run, world_size, world_size)
    for number, (dtype, borders, form, nesterov) in enumerate(cases(world_size)):
        starts, grads = starts_and_grads(dtype)
        assert len(borders[0]) == world_size + 1
        expected = expected_run(starts, grads, form, nesterov)
        check_parts([result[number] for result in results], expected)


def every_run(rank, world_size):
    """This rank's part of every case."""
    results = []
    for dtype, borders, form, nesterov in cases(world_size):
        starts, grads = starts_and_grads(dtype)
        results.append(partition_run(starts, grads, form, nesterov, rank=rank, borders=borders))
    return results


def cases(world_size):
    cuts = [
        (torch.float32, equal_borders(world_size)),
        (torch.float64, equal_borders(world_size)),
        (torch.float32, borders_with_empty_partitions(world_size)),
    ]
    return [(dtype, borders, form, nesterov) for dtype, borders in cuts for form, nesterov in VARIANTS]


def equal_borders(world_size):
    """As ZeRO cuts: equal partitions, and padding in the last one."""
    totals = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in (SHAPES, PLAIN_SHAPES)]
    sizes = [-(-(total + PADDING) // world_size) for total in totals]
    return [[rank * size for rank in range(world_size + 1)] for size in sizes]


def borders_with_empty_partitions(world_size):
    """All but the first tensor's beginning lies on the last rank; of the plain group all lies on the first one.

    The first rank's next neighbours own nothing of the adapted group, and the last ones nothing but padding of the
    plain one.
    """
    totals = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in (SHAPES, PLAIN_SHAPES)]
    adapted = [0, *[100] * (world_size - 1), totals[0] + PADDING]
    plain = [0, *[totals[1] + PADDING + 3 * i for i in range(world_size)]]
    return [adapted, plain]
