"""A method whose gradients are given, and engines in the processes of `tests.distributed.ranks`.

`Slopes` takes one view: a row of slopes, as many as it has parameters; its loss is ⟨parameters, slopes⟩. So the truth
after any number of steps is the optimizer's formula, in float64, on the mean of the ranks' slopes.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from model.methods.base import Method
from train.engine import Engine, init_process_group
from train.optim.lars_reference import lars_step
from train.optim.param_groups import param_groups
from train.runtime import Ranks

LR = 50.0  # one step moves an adapted tensor by LR · TRUST of its norm
TRUST = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-2
FORMS = [("classic", False), ("classic", True), ("non_classic", False), ("larc", False)]


class Slopes(Method):
    """176 + 5 parameters. On 4 ranks a partition of the first group is 44 elements: the convolution spans three; one of
    the second is 2, so the last rank's is padding. Linear and Conv2d: what DeepSpeed knows to be safe in bfloat16."""

    num_views = 1

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.conv = nn.Conv2d(4, 6, 2, bias=False)
        self.zeros = nn.Linear(6, 2, bias=False)
        self.last = nn.Linear(3, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for size, parameter in enumerate(self.parameters(), start=1):
            nn.init.normal_(parameter, std=size, generator=generator)
        nn.init.zeros_(self.zeros.weight)

    def project(self, views):
        parameters = torch.cat([parameter.flatten() for parameter in self.parameters()])
        return [parameters * views[0]]

    def loss(self, projections, labels=None):
        return projections[0].sum(), {}


def num_slopes():
    return sum(parameter.numel() for parameter in Slopes().parameters())


def slopes(step, rank, world_size):
    """[1, parameters] of one rank; ranks differ much, and their mean is nearly the same for any number of them."""
    generator = torch.Generator().manual_seed(100 + step)
    mean = torch.randn(1, num_slopes(), generator=generator)
    return mean * (1 + rank - (world_size - 1) / 2)


def mean_slopes(step, world_size):
    """`{parameter name: gradient}`, the mean over the ranks, in float64."""
    ranks = [slopes(step, rank, world_size).double() for rank in range(world_size)]
    parameters = dict(Slopes().named_parameters())
    pieces = torch.stack(ranks).mean(0)[0].split([parameter.numel() for parameter in parameters.values()])
    return {name: piece.view_as(parameters[name]) for name, piece in zip(parameters, pieces, strict=True)}


class LARSFormula:
    """The steps of LARS on whole tensors, in float64: `parameters` and `momentum` by name."""

    def __init__(self, method, form="classic", nesterov=False):
        self.parameters = {name: value.detach().double() for name, value in method.named_parameters()}
        self.momentum = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self._options = {
            name: {"weight_decay": group["weight_decay"], "adapt": group["adapt"], "form": form, "nesterov": nesterov}
            for group in param_groups(method, WEIGHT_DECAY)
            for name in group["param_names"]
        }

    def step(self, gradients, lr=LR):
        for name, gradient in gradients.items():
            self.parameters[name], self.momentum[name] = lars_step(
                self.parameters[name],
                gradient.double(),
                self.momentum[name],
                lr=lr,
                momentum=MOMENTUM,
                trust_coefficient=TRUST,
                **self._options[name],
            )


def make_engine(method, optimizer, **options):
    """An engine for the ranks that are running; on the CPU, in float32, of one image a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cpu")
    init_process_group(device)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    return Engine(
        method, optimizer, ranks=ranks, device=device, **{"precision": "fp32", "local_batch_size": 1} | options
    )


def take_steps(engine, steps, lr=LR):
    for step in steps:
        engine.train_step([slopes(step, dist.get_rank(), dist.get_world_size())], lr=lr, step=step + 1)


def copy_of(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def distance(found, expected):
    """The largest ‖found − expected‖ / ‖expected‖ of a tensor, between two dictionaries of the same names."""
    assert found.keys() == expected.keys()
    return max(((found[name].double() - expected[name]).norm() / expected[name].norm()).item() for name in found)


def motion(parameters, method):
    """How far parameters have moved from those of a method that has not been trained."""
    return {name: parameters[name].double() - value.detach().double() for name, value in method.named_parameters()}
