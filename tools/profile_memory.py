"""What a network takes: memory for each image, memory whatever the batch, and floating-point operations.

Activations are measured as a difference between two batch sizes, so that what does not depend on the batch drops out:
the peak of one forward and backward pass of the network, on a GPU of its allocator, on a CPU of the tensors that are
alive, counted as they come and go. Operations are those that `torch.utils.flop_counter` knows (products of matrices and
convolutions), of which a multiply-add makes two; the loss has none of them.

Shapes: N images.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.methods.base import Method
from train.optim.lars import LARS

MAX_IMAGES = 16  # of the larger batch that activations are measured with
COUNTED_IMAGES = 2  # of the batch whose operations are counted


def activation_bytes_per_image(method: Method, views: list[Tensor], autocast: dict[str, Any]) -> float:
    """Bytes that one more image of a (micro-)batch adds to the peak of a step. All ranks must call.

    Args:
        method: of the run, in training mode; its running statistics move, its weights and gradients do not.
        views: of at least 2 images, [N, 3, S, S] each.
        autocast: of the run's steps.
    """
    num = min(len(views[0]), MAX_IMAGES)
    half = max(1, num // 2)
    measure = _peak_on_gpu if views[0].is_cuda else _peak_on_cpu

    def peak(size: int) -> int:
        return measure(lambda: _pass(method, [view[:size] for view in views], autocast), [method, views])

    if half == num:
        return float(peak(num))
    peak(half)  # buffers that are made once
    return (peak(num) - peak(half)) / (num - half)


def flops_per_image(method: Method, views: list[Tensor], autocast: dict[str, Any]) -> float:
    """Floating-point operations of an image's views, forward and backward. All ranks must call."""
    num = min(len(views[0]), COUNTED_IMAGES)
    with _uncompiled(), FlopCounterMode(display=False) as counter:
        _pass(method, [view[:num] for view in views], autocast)
    return float(counter.get_total_flops()) / num


def state_bytes(method: Method, optimizer: LARS, *, zero_stage: int, world_size: int) -> int:
    """Bytes of parameters, gradients and the optimizer's state on this rank, after a step."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = 4 * sum(parameter.numel() for parameter in parameters)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in [*parameters, *stepped]}
    kept: int = sum(storage.nbytes() for storage in storages.values())
    return kept + sum(slot.nbytes for slot in slots) + (gradients // world_size if zero_stage == 2 else gradients)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # forbidden in some containers: then the process counts from its start
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of the resident set


def peak_bytes(device: torch.device) -> int:
    """The most memory that torch has taken of a GPU; on a CPU, that this process has had."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status").read_text().splitlines()
    found = [line.split() for line in status if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _uncompiled() -> AbstractContextManager[Any]:
    """What was compiled runs as it was written; torch's compiler takes seconds to import, and is where it was used."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _pass(method: Method, views: list[Tensor], autocast: dict[str, Any]) -> None:
    """Forward and backward; no parameter's `grad` is touched."""
    with torch.autocast(**autocast):
        projections = method.project(views)
    total = torch.stack([projection.float().sum() for projection in projections if projection.requires_grad]).sum()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    torch.autograd.grad(total, parameters, allow_unused=True)


def _peak_on_gpu(work: Callable[[], None], _: list[Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with _uncompiled():
        work()
    torch.cuda.synchronize()
    peak: int = torch.cuda.max_memory_allocated() - before
    return peak


def _peak_on_cpu(work: Callable[[], None], held: list[Any]) -> int:
    with _uncompiled(), LiveBytes(held) as live:
        work()
    peak: int = live.peak
    return peak


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, while they are alive.

    Args:
        held: modules and tensors that are there already, and do not count.

    Attributes:
        peak: the most bytes at a time.
    """

    def __init__(self, held: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}
        for thing in held:
            if isinstance(thing, torch.nn.Module):
                tensors: list[Any] = [*thing.parameters(), *thing.buffers()]
            else:
                tensors = tree_leaves(thing)
            self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and see what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
