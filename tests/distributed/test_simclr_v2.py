"""What SimCLR v2 adds, on W ranks: one process on the whole batch says the same.

Pretraining with a memory, over several steps and once around the queue; distillation with labels that one rank has and
another has not.
"""

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.heads import ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss
from model.memory import MemoryConfig
from model.methods.distill import Distill, DistillConfig
from model.methods.simclr_memory import SimCLRWithMemory
from model.methods.supervised import ClassifierConfig, Supervised
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

GLOBAL_BATCH_SIZE, NUM_STEPS = 8, 3
ENCODER = EncoderConfig(depth=10, width=0.125, stem="cifar")
HEAD = ProjectionHeadConfig(num_layers=3, hidden_dim=16, out_dim=8)
CLASSIFIER = ClassifierConfig(num_classes=5)
LABELS = [[3, 0, -1, 4, -1, -1, 2, -1], [-1, -1, -1, -1, 1, -1, -1, 3], [-1] * GLOBAL_BATCH_SIZE]
"""Of each step: both of two ranks have some, the second alone, none."""


def opened(method):
    """In float64, with every γ away from the 0 that would close the blocks."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in method.named_parameters():
        if parameter.ndim == 1 and "classifier" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return method.double()


def build():
    torch.manual_seed(3)
    memory = MemoryConfig(size=27, ema_decay=0.5)  # holds 1.7 batches of keys
    pretrained = SimCLRWithMemory(ENCODER, HEAD, ContrastiveLoss(temperature=0.3), memory)
    student = Distill(ENCODER, HEAD, CLASSIFIER, DistillConfig(temperature=0.5, label_weight=0.4))
    student.set_teacher(opened(Supervised(ENCODER, HEAD, CLASSIFIER)).float())
    return opened(pretrained), opened(student)


def train(method, own):
    """Gradient steps on the rows `own` of fixed batches, averaged over ranks; all losses and metrics, and the state."""
    generator = torch.Generator().manual_seed(5)
    told = []
    for step in range(NUM_STEPS):
        images = torch.randn(2, GLOBAL_BATCH_SIZE, 3, 8, 8, generator=generator, dtype=torch.float64)
        loss, metrics = method([view[own] for view in images][: method.num_views], torch.tensor(LABELS[step])[own])
        parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
        gradients = [*torch.autograd.grad(loss, parameters)]
        means = [loss.detach().clone(), *(value.double().clone() for value in metrics.values())]
        for value in (*gradients, *means):
            collectives.all_reduce_sum_(value).div_(collectives.world_size())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= 0.1 * gradient
        method.after_step(step + 1)
        told.append(dict(zip(["loss", *metrics], means, strict=True)))
    return told, method.state_dict()


def on_rank(rank):
    num_images = GLOBAL_BATCH_SIZE // (dist.get_world_size() if dist.is_initialized() else 1)
    own = slice(rank * num_images, (rank + 1) * num_images)
    pretrained, student = build()
    return train(pretrained, own), train(student, own)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world_size):
    expected = on_rank(0)
    (told, state), (distilled, _) = expected
    assert state["memory.num_pushed"] == NUM_STEPS * 2 * GLOBAL_BATCH_SIZE
    assert len({line["loss"].item() for line in (*told, *distilled)}) == 2 * NUM_STEPS
    for line in told:  # of this rank's rows alone, by its definition
        del line["projection_std"]
    for found in run_ranks(on_rank, world_size):
        for line in found[0][0]:
            del line["projection_std"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
