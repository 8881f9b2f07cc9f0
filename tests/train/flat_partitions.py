"""A model's tensors in flat partitions, cut anywhere, as ZeRO leaves them to an optimizer; and what steps must give."""

import math

import torch

from train.optim.lars import LARS
from train.optim.lars_reference import lars_step
from train.optim.stretches import Piece

SHAPES = ((41, 7), (3, 5, 3, 3), (1,), (130, 40))  # of the tensors that are adapted
PLAIN_SHAPES = ((41,), (7,), (1,))  # and of those that are not
OPTIONS = {"momentum": 0.9, "trust_coefficient": 0.05}
GROUPS = ({"weight_decay": 0.02, "adapt": True}, {"weight_decay": 0.0, "adapt": False})
RATES = (0.7, 0.1, 1.3)
PADDING = 11
TOLERANCES = {
    torch.float32: (7e-8, 1e-7),
    torch.float64: (3e-16, 1e-15),
}
"""Of parameters and of momentum after three steps, as shares of the whole norm: a few roundings."""


def starts_and_grads(dtype):
    """The tensors of both groups, and for each step their gradients; one tensor is zero."""
    generator = torch.Generator().manual_seed(8)
    groups = (SHAPES, PLAIN_SHAPES)

    def draw():
        return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for shapes in groups]

    starts = draw()
    starts[0][1].zero_()
    return starts, [draw() for _ in RATES]


def expected_run(starts, grads, form, nesterov):
    """Parameters and momentum after all steps, in float64, each group flat."""
    results = []
    for group, options in enumerate(GROUPS):
        tensors = []
        for i, start in enumerate(starts[group]):
            p, v = start.double(), torch.zeros_like(start, dtype=torch.float64)
            for lr, step_grads in zip(RATES, grads, strict=True):
                g = step_grads[group][i].double()
                p, v = lars_step(p, g, v, lr=lr, form=form, nesterov=nesterov, **OPTIONS, **options)
            tensors.append((p.flatten(), v.flatten()))
        results.append([torch.cat(many) for many in zip(*tensors, strict=True)])
    return results


def partition_run(starts, grads, form, nesterov, *, rank, borders, group=None, backend="auto"):
    """This rank's part after all steps: parameters and momentum, one flat pair for each group.

    `borders` says, for each group, where the partitions of the ranks begin and end in its flat tensor; what is beyond
    its tensors is padding, filled with NaN. A partition that is all padding has no gradient.
    """
    flats, pieces, params, first_number = [], {}, [], 0
    for index, tensors in enumerate(starts):
        begin, end = borders[index][rank : rank + 2]
        param = torch.nn.Parameter(_cut(tensors, begin, end))
        flats.append((begin, end))
        params.append(param)
        pieces[param], offset = [], 0
        for number, tensor in enumerate(tensors, start=first_number):
            first, last = max(offset, begin), min(offset + tensor.numel(), end)
            if first < last:
                pieces[param].append(Piece(f"tensor{number}", number, first - begin, last - first))
            offset += tensor.numel()
        first_number += len(tensors)
    groups = [{"params": [param], **options} for param, options in zip(params, GROUPS, strict=True)]
    optimizer = LARS(groups, form=form, nesterov=nesterov, backend=backend, **OPTIONS)
    optimizer.partition(pieces, first_number, group)
    for lr, step_grads in zip(RATES, grads, strict=True):
        for index, param in enumerate(params):
            optimizer.param_groups[index]["lr"] = lr
            param.grad = _cut(step_grads[index], *flats[index]) if pieces[param] else None
        optimizer.step()
    empty = torch.zeros(0)
    return [(param.detach(), optimizer.state.get(param, {}).get("momentum", empty)) for param in params]


def check_parts(parts, expected):
    """The ranks' parts [rank][group] together against what one process gives."""
    for group, (p, v) in enumerate(expected):
        flat_p, flat_v = (torch.cat([part[group][i] for part in parts]) for i in range(2))
        for_p, for_v = TOLERANCES[flat_p.dtype]
        assert flat_p[p.numel() :].isnan().all(), "padding stays as it is"
        assert (flat_p[: p.numel()] - p).norm() <= for_p * p.norm()
        assert (flat_v[: v.numel()] - v).norm() <= for_v * v.norm()


def _cut(tensors, begin, end):
    """A stretch of the flat tensor, with NaN behind the tensors."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    padded = torch.cat([flat, flat.new_full((max(0, end - flat.numel()),), math.nan)])
    return padded[begin:end].clone()
