"""Stretches to step LARS over, made from a seed wherever they are wanted, and what the formula says of them."""

from itertools import product

import torch

from train.optim.lars_reference import lars_step
from train.optim.stretches import Options, Stretches

FORMS = ("classic", "non_classic", "larc")
EVERY_OPTION = [
    Options(0.7, 0.9, 0.01, 0.02, adapt, form, nesterov)
    for form, nesterov, adapt in product(FORMS, (False, True), (True, False))
]
SIZES = (1, 41, 401, 1271, 2047, 2048, 2049, 8191, 8192, 8193, 20480, 24583)
"""Around the kernels' blocks and chunks, and two or three chunks."""


def options(form="classic", **others):
    """Options of one form, of rates at which every part of it shows."""
    defaults = {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02}
    return Options(**defaults | {"form": form, "adapt": True, "nesterov": False} | others)


def stretches(
    sizes, options, *, offsets=(0, 0, 0), params=torch.float32, grads=torch.float32, zeros="", device="cpu", seed=0
):
    """Random ones, each a tensor; `options` is one for all, or one for each.

    Args:
        sizes: of the stretches.
        options: theirs.
        offsets: of p, g and v from the beginning of their memory, in elements.
        params: dtype of p and v.
        grads: dtype of g.
        zeros: any of "pgv": what is 0.
        device: where they are.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, dtype, offset in zip("pgv", (params, grads, params), offsets, strict=True):
        scale = 0.0 if name in zeros else 0.3 if name == "v" else 1.0
        padded = [scale * torch.randn(size + offset, generator=generator) for size in sizes]
        tensors.append([tensor.to(device, dtype)[offset:] for tensor in padded])
    each = options if isinstance(options, list) else [options] * len(sizes)
    return Stretches(*tensors, list(range(len(sizes))), each, len(sizes))


def expected(whole):
    """The next p and v by the formula, float64: one list each."""
    pairs = [
        lars_step(p.double().cpu(), g.double().cpu(), v.double().cpu(), **options._asdict())
        for p, g, v, options in zip(whole.params, whole.grads, whole.buffers, whole.options, strict=True)
    ]
    return [p for p, _ in pairs], [v for _, v in pairs]


def cut(whole, num_parts):
    """Each stretch in `num_parts`, whose borders are odd; views."""
    borders = [[size * i // num_parts | 1 for i in range(1, num_parts)] for size in map(len, whole.params)]
    parts = [
        [part for tensor, border in zip(tensors, borders, strict=True) for part in tensor.tensor_split(border)]
        for tensors in whole[:3]
    ]
    tensors = [tensor for tensor in whole.tensors for _ in range(num_parts)]
    each = [options for options in whole.options for _ in range(num_parts)]
    return Stretches(*parts, tensors, each, whole.num_tensors)


def some(whole, indices):
    """The stretches of these indices alone; views."""
    return Stretches(*([column[i] for i in indices] for column in whole[:5]), whole.num_tensors)


def norms(whole):
    """‖p‖² and ‖d‖² of stretches that are whole tensors, float64 [num_tensors, 2], by the formula of each form."""
    rows = torch.zeros(whole.num_tensors, 2, dtype=torch.float64)
    columns = ([t.double().cpu() for t in column] for column in whole[:3])
    for p, g, v, tensor, options in zip(*columns, whole.tensors, whole.options, strict=True):
        decayed = g + options.weight_decay * p
        buffer = options.momentum * v + decayed
        update = options.momentum * buffer + decayed if options.nesterov else buffer
        measured = {"classic": decayed, "non_classic": update, "larc": g}[options.form]
        rows[tensor] = torch.stack([p.square().sum(), measured.square().sum()])
    return rows
