"""The compiled encoder learns as the plain one does: in one process, and over two ranks as one graph."""

import pytest
import torch
import torch._dynamo
from torch import nn

from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from train.cli import UnfitEnvironment
from train.compilation import compile_encoder

CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    temperature=0.5,
)
# Float32 in another order of operations, through some steps of training.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def make(checkpointed=False):
    method = build_method(CONFIG, seed=3).to(memory_format=torch.channels_last)
    if checkpointed:
        checkpoint_activations(method.encoder)
    return method


def train(method, sides, rank=0, lr=0.02):
    """Losses of a step a side, and the state after them."""
    losses = []
    for step, side in enumerate(sides):
        generator = torch.Generator().manual_seed(10 * step + rank)
        image, *noise = torch.randn(3, 4, 3, side, side, generator=generator)
        views = [(image + 0.5 * n).contiguous(memory_format=torch.channels_last) for n in noise]
        loss, _ = method(views)
        method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.sub_(parameter.grad, alpha=lr)
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | method.state_dict()


def compare(compiled, plain, sides, rank=0):
    torch.testing.assert_close(train(compiled, sides, rank), train(plain, sides, rank), **ROUNDING)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # what other tests of the process compiled
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("sides", [(8, 8), pytest.param((8, 8, 12, 16, 8), marks=pytest.mark.slow)], ids=str)
def test_losses_and_weights_are_those_of_the_plain_one(sides):
    """Hooks see the representation, and names stay."""
    plain, compiled = make(), make()
    compile_encoder(compiled, "default")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    shapes = []
    compiled.encoder.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    compare(compiled, plain, sides)
    assert shapes == [(8, compiled.encoder.feature_dim)] * len(sides)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_other_modes_with_recomputed_activations(mode):
    compiled = make(checkpointed=True)
    compile_encoder(compiled, mode)
    compare(compiled, make(), (8, 12, 16, 8))


class _Replayed(torch.autograd.Function):
    """Puts each gradient where the last one was, as the replay of a CUDA graph does."""

    @staticmethod
    def forward(ctx, weight, memory):
        ctx.memory = memory
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.memory.copy_(grad).detach(), None


class _GraphLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.memory = torch.zeros(2)

    def forward(self, x):
        return x * _Replayed.apply(self.weight, self.memory)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_gradients_of_micro_batches_add_up_where_a_graph_writes_over_them(monkeypatch, mode):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    method = nn.Module()
    method.encoder = _GraphLike()
    compile_encoder(method, mode)
    for x in ([1.0, 2.0], [10.0, 20.0], [100.0, 200.0]):
        method.encoder(torch.tensor(x)).sum().backward()
    assert method.encoder.weight.grad.tolist() == [111.0, 222.0]


def test_every_side_of_a_growing_run_is_compiled(monkeypatch):
    """With micro-batches twice: once without a graph for the backward."""
    compiled, compile_with = [], torch.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_with(function, backend=count, dynamic=False)
    )
    method = nn.Module()
    method.encoder = nn.Conv2d(3, 2, 3)
    compile_encoder(method, "default")
    compiled.clear()
    for side in range(8, 17):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                method.encoder(torch.zeros(1, 3, side, side))
    assert len(compiled) == 2 * 9


def test_off_leaves_the_encoder_as_it_is():
    method = make()
    compile_encoder(method, "off")
    assert "forward" not in vars(method.encoder)


def test_a_machine_without_a_compiler_is_told_what_it_lacks(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    method = make()
    with pytest.raises(UnfitEnvironment) as caught:
        compile_encoder(method, "default")
    line = str(caught.value)
    assert line.startswith("`train.compile` cannot compile for cpu on this machine: InvalidCxxCompiler: No working C++")
    assert line.endswith("install a C++ compiler (Debian: g++) and Python's headers (python3-dev), or set it to off")
    assert "\n" not in line
    assert "forward" not in vars(method.encoder)


@pytest.mark.distributed
def test_two_ranks_as_one_graph():
    """Batch norm's collectives and all: no break, and the same order on both ranks. Without writing machine code."""
    run_ranks(check_traced, 2)


def check_traced(rank):
    for checkpointed, sides in ((False, (8, 12)), (True, (8,))):
        traced = make(checkpointed)
        traced.encoder.forward = torch.compile(
            traced.encoder.forward, backend="aot_eager", dynamic=False, fullgraph=True
        )
        compare(traced, make(), sides, rank)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_compiled():
    run_ranks(check_compiled, 2)


def check_compiled(rank):
    for checkpointed in (False, True):
        compiled = make(checkpointed)
        compile_encoder(compiled, "default")
        compare(compiled, make(), (8, 8, 12), rank)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            views = list(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)))
            assert all(projection.isfinite().all() for projection in compiled.project(views))
