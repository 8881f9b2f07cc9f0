"""Deterministic mode: what it sets before anything runs, and the line for an operation that has no such form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.cli import RunFailed
from train.determinism import CUBLAS_VARIABLE, NCCL_VARIABLE, allow_fastest, explain, make_deterministic

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, filling.fill_uninitialized_memory
    for name in (CUBLAS_VARIABLE, NCCL_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what is set is taken away again
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic, filling.fill_uninitialized_memory = before


def test_everything_is_set():
    allow_fastest()
    assert torch.backends.cudnn.benchmark
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    assert os.environ[NCCL_VARIABLE] == "^NVLS,NVLSTree"


def test_what_the_user_chose_stays_if_it_is_reproducible(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    monkeypatch.setenv(NCCL_VARIABLE, "Ring")
    make_deterministic()
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"
    assert os.environ[NCCL_VARIABLE] == "Ring"
    monkeypatch.setenv(CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(
        ValueError,
        match=r"^`train.deterministic` needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, "
        r"got :0:0; unset it",
    ):
        make_deterministic()


def test_an_operation_without_a_deterministic_form_is_named():
    make_deterministic()
    with pytest.raises(RuntimeError) as caught:
        torch.ones(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    line = explain(caught.value)
    assert isinstance(line, RunFailed)
    assert line.alike
    assert str(line).startswith("torch has no deterministic form of put_ on this device, which this run needs; set ")
    assert explain(RuntimeError("out of memory")) is None
    assert explain(ValueError(str(caught.value))) is None


def test_no_kernel_of_ours_adds_atomically():
    """Nor hands out work by a counter; what threads or programs add up together would depend on who comes first."""
    sources = [path for name in ("native", "pipelines", "model", "train") for path in (ROOT / name).rglob("*.py")]
    kernels = [path for path in sources if re.search(r"@triton\.jit|njit|@intrinsic", path.read_text())]
    assert len(kernels) > 10
    for path in kernels:
        assert not re.search(r"atomic_|atomicrmw|cmpxchg|fastmath=True|prange", path.read_text()), path


STEP = """
import torch
from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from train.determinism import make_deterministic

make_deterministic()
for encoder in ({"depth": 10}, {"depth": 50, "selective_kernel": True}):
    config = ModelConfig(
        encoder=EncoderConfig(width=0.125, **encoder), projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8)
    )
    method = build_method(config, seed=0)
    loss, _ = method(list(torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))))
    loss.backward()
    print(loss.item().hex(), sum(parameter.grad.double().sum() for parameter in method.parameters()).item().hex())
"""


def test_a_step_runs_in_this_mode_and_gives_the_same_bits():
    """Both stems, both shortcuts. On a GPU: tests/gpu/test_graph_capture.py."""
    runs = [subprocess.run([sys.executable, "-c", STEP], check=True, capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.split()) == 4
