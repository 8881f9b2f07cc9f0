"""A whole training step recorded in a CUDA graph and replayed, against steps that are launched one by one."""

import subprocess
import sys

import pytest
import torch

from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.ema import WeightAverage
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from train.compilation import compile_encoder
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BATCH_SIZE = 16
NUM_WARMUP = 3
RATES = [0.1, 0.3, 0.2, 0.05]


class Training:
    """A method with everything that a step of it touches, at fixed addresses."""

    def __init__(self, backend, checkpointed):
        config = ModelConfig(
            encoder=EncoderConfig(depth=18, width=0.5),
            projection_head=ProjectionHeadConfig(out_dim=64),
            learn_temperature=True,
        )
        self.method = build_method(config, seed=0).cuda().to(memory_format=torch.channels_last)
        if checkpointed:
            checkpoint_activations(self.method.encoder)
        self.lr = torch.zeros((), device="cuda")
        self.optimizer = LARS(param_groups(self.method, 1e-6), lr=self.lr, backend=backend)
        self.optimizer.skip = torch.zeros((), dtype=torch.bool, device="cuda")
        self.average = WeightAverage(self.method, 0.9)
        shape = (BATCH_SIZE, 3, 64, 64)
        self.views = [torch.empty(shape, device="cuda", memory_format=torch.channels_last) for _ in range(2)]
        self.loss = torch.zeros((), device="cuda")

    def step(self):
        # Cached casts of weights would be made in the warm-up and not again in a replay.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss, _ = self.method(self.views)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.update(self.optimizer.skip)
        self.loss.copy_(loss.detach())

    def feed(self, step, lr, skip=False):
        generator = torch.Generator().manual_seed(step)
        image, *noise = torch.randn(3, BATCH_SIZE, 3, 64, 64, generator=generator)
        for view, n in zip(self.views, noise, strict=True):
            view.copy_(image + 0.5 * n)
        self.lr.fill_(lr)
        self.optimizer.skip.fill_(skip)

    def warm_up(self):
        """On a stream of its own, as a capture wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(NUM_WARMUP):
                self.feed(step, 0.1)
                self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def state(self):
        momentum = [slots["momentum"].clone() for slots in self.optimizer.state.values()]
        tensors = [*self.method.state_dict().values(), *self.average.state_dict().values(), self.loss]
        return [tensor.clone() for tensor in tensors] + momentum


@pytest.fixture(autouse=True)
def _fixed_algorithms():
    """cuDNN's additions in one order, so that bits can be compared; no search for faster ones in a capture."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_replayed_steps_are_the_launched_ones(backend, checkpointed):
    """With other views and another rate in each, and a step that is left out by its flag."""
    launched, replayed = Training(backend, checkpointed), Training(backend, checkpointed)
    for training in (launched, replayed):
        training.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recording runs nothing
        replayed.step()
    losses = []
    for i, lr in enumerate(RATES):
        for training in (launched, replayed):
            training.feed(NUM_WARMUP + i, lr, skip=i == 2)
        launched.step()
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(replayed.state(), launched.state(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        losses.append(replayed.loss.item())
    assert len(set(losses)) == len(RATES)


def test_a_compiled_encoder_that_records_graphs_learns_as_the_plain_one():
    """What it gave before stays as it was: others may hold it over several passes, as micro-batches do."""
    plain, compiled = Training("triton", False), Training("triton", False)
    compile_encoder(compiled.method, "reduce-overhead")
    held = []
    compiled.method.encoder.register_forward_hook(
        lambda module, inputs, h: held.append((h.detach(), h.detach().clone()))
    )
    for step, lr in enumerate(RATES):
        for training in (plain, compiled):
            training.feed(step, lr)
            training.step()
        # The first losses agree to bfloat16; rounding grows through the steps.
        assert compiled.loss.item() == pytest.approx(plain.loss.item(), rel=5e-2)
    assert all(torch.equal(h, copied) for h, copied in held)


DETERMINISTIC = """
from train.determinism import make_deterministic
make_deterministic()
import torch
from tests.gpu.test_graph_capture import RATES, Training
training = Training("triton", False)
for step, lr in enumerate(RATES):
    training.feed(step, lr)
    training.step()
print(sum(tensor.double().sum() for tensor in training.state()).item().hex())
"""


def test_deterministic_mode_runs_every_operation_and_gives_the_same_bits():
    """In processes of their own: its settings are read when CUDA starts."""
    runs = [
        subprocess.run([sys.executable, "-c", DETERMINISTIC], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
