"""A training step reads nothing back on the host: what a CUDA graph could not record, and a GPU would be waited for.

Everything of a step that is the same on all devices runs here on the CPU: network, loss (its torch backend), backward,
guard, LARS (its torch backend), and the moving average, through the real engine. What a CPU does by design, and a GPU
does not, is named. The capture itself: tests/gpu/test_graph_capture.py.
"""

import functools
from unittest.mock import patch

import pytest
import torch

import model.losses.contrastive
from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.ema import WeightAverage
from model.heads import ProjectionHeadConfig
from model.ntxent.loss import nt_xent
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from tests.train.host_reads import HostReads
from tests.train.slopes import make_engine
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

NUM_IMAGES = 4
# On a CPU a step is judged at once; on a GPU when the loop looks at its metrics, outside the step.
BY_DESIGN = {("tolist", "train.nonfinite.check")}
CASES = [
    {"encoder": {"depth": 10}},
    {"encoder": {"depth": 10}, "checkpointed": True, "on_nonfinite": "skip"},
    {"encoder": {"depth": 10, "stem": "cifar"}, "micro_batch_size": 2, "precision": "fp32"},
    {"encoder": {"depth": 50, "selective_kernel": True}},
]


@pytest.mark.distributed
def test_a_step_reads_nothing_but_its_verdict_on_a_cpu():
    run_ranks(check_steps, 1)


def check_steps(rank):
    """With the loss's torch backend: `auto` takes compiled code on a CPU, which reads memory as such code does."""
    assert rank == 0
    with patch.object(model.losses.contrastive, "nt_xent", functools.partial(nt_xent, backend="tiled")):
        for case in CASES:
            assert reads_of_a_step(**case) == BY_DESIGN, case


def reads_of_a_step(*, encoder, checkpointed=False, **options):
    """What the third step of a run reads."""
    config = ModelConfig(
        encoder=EncoderConfig(width=0.125, **encoder),
        projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
        learn_temperature=True,
    )
    method = build_method(config, seed=0)
    if checkpointed:
        checkpoint_activations(method.encoder)
    optimizer = LARS(param_groups(method, 1e-4), nesterov=True, backend="reference")
    engine = make_engine(method, optimizer, **{"precision": "bf16", "local_batch_size": NUM_IMAGES} | options)
    average = WeightAverage(method, 0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        views = [torch.randn(NUM_IMAGES, 3, 32, 32, generator=generator) for _ in range(2)]
        before = method.encoder.bn1.weight.clone()
        with HostReads() as reads:
            engine.train_step(views, lr=0.1, step=step)
            average.update(engine.left_out)
        assert not torch.equal(method.encoder.bn1.weight, before)
    return reads.found


def test_reads_and_shapes_that_depend_on_data_are_seen():
    x = torch.tensor([1.0, 0.0, 2.0])
    mask = x > 0
    for read in (
        x[0].item,
        lambda: float(x[0]),
        lambda: bool(mask[0]),
        lambda: 1 if mask.any() else 0,
        x.tolist,
        x.numpy,
        x.cpu,
        lambda: range(3)[mask.sum()],
        lambda: x[mask],
        lambda: x.clone().__setitem__(mask, torch.ones(2)),
        x.nonzero,
        lambda: x.masked_select(mask),
        x.unique,
        lambda: torch.equal(x, x),
        lambda: torch.where(mask),
    ):
        with HostReads() as reads:
            read()
        assert reads.found
    with HostReads() as reads:
        x[0] = 1.0
        x.masked_fill_(mask, 2.0)
        torch.where(mask, x, 0.0)
        x.clone()[torch.tensor([0, 2])] += 1.0
    assert reads.found == set()
