"""Stretches for tests of LARS's backends, and steps over them in float64."""

import itertools

import torch

from train.optim.lars_reference import lars_step
from train.optim.stretches import FORMS, Options, Stretches

VARIANTS = tuple(itertools.product(FORMS, (False, True)))
SHAPES = ((41, 3, 7, 7), (401,), (1271, 41), (), (1,), (16384,), (3, 16385))


def random_stretches(form, nesterov, *, shapes=SHAPES, dtype=torch.float32, seed=0):
    """Every shape adapted and not; momentum that is not zero, and one parameter and one gradient that are."""
    generator = torch.Generator().manual_seed(seed)
    stretches = Stretches([], [], [], [], [], num_tensors=2 * len(shapes) + 2)
    common = {"lr": 0.7, "momentum": 0.9, "form": form, "nesterov": nesterov}
    adapted = Options(weight_decay=0.02, trust_coefficient=0.3, adapt=True, **common)
    plain = Options(weight_decay=0.01, trust_coefficient=0.3, adapt=False, **common)
    for options, shape in itertools.product((adapted, plain), shapes):
        for tensors in (stretches.params, stretches.grads, stretches.buffers):
            tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        stretches.options.append(options)
    for zero in (stretches.params, stretches.grads):
        for tensors in (stretches.params, stretches.grads, stretches.buffers):
            tensors.append(torch.randn(50, generator=generator, dtype=torch.float64).to(dtype))
        zero[-1].zero_()
        stretches.options.append(adapted)
    stretches.tensors.extend(range(stretches.num_tensors))
    return stretches


def clone(stretches):
    return stretches._replace(**{name: [x.clone() for x in getattr(stretches, name)] for name in stretches._fields[:3]})


def expected_step(stretches):
    """Parameters and buffers after a step, in float64."""
    return [
        lars_step(p.double(), g.double(), v.double(), **options._asdict())
        for p, g, v, options in zip(*stretches[:3], stretches.options, strict=True)
    ]


def assert_close_to(stretches, expected, *, rtol):
    """Within `rtol` of each tensor's largest element."""
    for p, v, (expected_p, expected_v) in zip(stretches.params, stretches.buffers, expected, strict=True):
        for found, wanted in ((p, expected_p), (v, expected_v)):
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=rtol * max(1.0, wanted.abs().max().item()))
