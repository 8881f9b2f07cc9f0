"""SimCLR end to end: W ranks with global batch norm and NT-Xent are one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from model import collectives
from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

GLOBAL_BATCH_SIZE = 12
CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    temperature=0.2,
)


def small_method():
    """In float64, with every γ away from the 0 that would close the blocks."""
    method = build_method(CONFIG, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return method


def forward_backward(own):
    """Loss, metrics, parameters' gradients and buffers for the rows `own` of a fixed batch."""
    generator = torch.Generator().manual_seed(5)
    image, *noise = torch.randn(3, GLOBAL_BATCH_SIZE, 3, 16, 16, generator=generator, dtype=torch.float64)
    views = [(image + 0.5 * n)[own].contiguous(memory_format=torch.channels_last) for n in noise]
    method = small_method().to(memory_format=torch.channels_last)
    loss, metrics = method(views)
    loss.backward()
    averaged = {"loss": loss.detach(), "contrastive_accuracy": metrics["contrastive_accuracy"]}
    averaged |= {name: parameter.grad for name, parameter in method.named_parameters()}
    return averaged, dict(method.named_buffers())


def on_rank(rank):
    world_size = dist.get_world_size()
    num_images = GLOBAL_BATCH_SIZE // world_size
    averaged, buffers = forward_backward(slice(rank * num_images, (rank + 1) * num_images))
    for value in averaged.values():
        collectives.all_reduce_sum_(value).div_(world_size)
    return averaged, buffers


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(world_size):
    expected_averaged, expected_buffers = forward_backward(slice(None))
    assert all(value.abs().sum() > 0 for value in expected_averaged.values())
    assert expected_averaged["contrastive_accuracy"] < 1
    for averaged, buffers in run_ranks(on_rank, world_size):
        torch.testing.assert_close(averaged, expected_averaged, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(buffers, expected_buffers, rtol=1e-10, atol=1e-10)
