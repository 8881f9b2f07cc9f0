"""The encoder compiled by `torch.compile`.

What is compiled is the encoder's forward pass; the rest of a step is the loss, which has kernels of its own, and small.
Only `encoder.forward` is replaced, so that hooks on the encoder run as before, around the compiled code, and its state
keeps its names. Each size of the views is compiled anew, when it first comes: a run has few of them.
"""

from __future__ import annotations

import importlib
import logging
import time
from typing import Literal

import torch
from torch import Tensor

from model.methods.base import Method
from train.cli import UnfitEnvironment

logger = logging.getLogger(__name__)

MAX_COMPILED = 256  # sizes of the views, each with and without a backward; torch gives up after 8 and says so once

CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]
"""`reduce-overhead` and `max-autotune` record CUDA graphs on a GPU."""


def compile_encoder(method: Method, mode: CompileMode) -> None:
    """Replace the encoder's forward pass by one that is compiled when it first runs; `off` does nothing.

    Call it when the encoder is on its device and before its first step. A deep copy of the method would run the
    original's encoder: copy it before.

    Raises:
        UnfitEnvironment: nothing can be compiled on this machine, tried on a sum of two numbers.
    """
    if mode == "off":
        return
    if torch.are_deterministic_algorithms_enabled():
        config = importlib.import_module("torch._inductor.config")
        config.deterministic = True  # type: ignore[attr-defined]  # else kernels are chosen by their time
    config = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = max(config.recompile_limit, MAX_COMPILED)  # type: ignore[attr-defined]
    _check_compiler(next(method.parameters()).device)
    encoder = method.encoder
    # A size that changes would otherwise be compiled as unknown from its second value on, into slower code.
    compiled = torch.compile(encoder.forward, mode=mode, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        """What the next replay of a CUDA graph does not write over: others may hold it longer."""
        output: Tensor = compiled(x).clone()
        return output

    encoder.forward = compiled if mode == "default" else forward  # type: ignore[method-assign]
    if mode != "default":
        for parameter in encoder.parameters():
            # Else `parameter.grad` becomes the graph's own memory, and the next micro-batch writes over it.
            parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]


def _check_compiler(device: torch.device) -> None:
    began = time.perf_counter()
    trial = torch.compile(torch.add)
    try:
        trial(torch.zeros(1, device=device), torch.ones(1, device=device))
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip()).strip().rstrip(".")
        raise UnfitEnvironment(
            f"`train.compile` cannot compile for {device.type} on this machine: {reason}; install a C++ compiler "
            "(Debian: g++) and Python's headers (python3-dev), or set it to off"
        ) from error
    logger.info("torch.compile: a trial took %.1f s", time.perf_counter() - began)
