"""What a step of a configuration consists of: operations, activations, parameters, collectives.

Nothing is measured. The method that a run would train is built on torch's meta device, where tensors have shapes and no
storage, and goes forward and backward once: `torch.utils.flop_counter` counts its floating-point operations, the hooks
of saved tensors what is kept for the backward. A ResNet-152 of triple width takes a few seconds and no memory.

Shapes: 2 images, V views of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.build import ModelConfig, build_method
from model.methods.base import Method
from model.methods.distill import Distill
from model.norm import GlobalBatchNorm
from train.config import PretrainConfig

NUM_IMAGES = 2  # batch norm refuses a single value of a channel
NO_BLOCK = ""  # of what lies outside the residual blocks: stem and head
GUARD = 1  # all-reduces of `train.nonfinite` in a step


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a step consists of, on one rank."""

    flops_per_image: float
    """Of forward and backward, all views; a product with a sum makes two. What is computed again is counted again."""
    activation_bytes_per_image: float
    """Kept between forward and backward for each image in the network."""
    recomputed_bytes_per_image: float
    """Kept while the largest block is computed again; 0 without `train.activation_checkpointing`."""
    parameters: int
    """Numbers that are trained."""
    operations: int
    """Calls of torch that start work on a device, forward and backward."""
    norm_layers: int
    """Batch norms over all ranks."""
    norm_bytes: int
    """That they reduce in a pass, in float32: 2C + 1 numbers each."""
    out_dim: int
    """D, numbers of a projection."""
    num_views: int
    """V."""

    def small_all_reduces(self, *, passes: int, recomputed: bool) -> int:
        """Of batch norm and of what looks for NaN, in a step.

        Args:
            passes: micro-batches of a step; where there are several, each goes forward twice.
            recomputed: whether blocks go forward once more in the backward.
        """
        each = 2 + int(passes > 1) + int(recomputed)
        return each * self.norm_layers * passes + GUARD


def count(config: PretrainConfig) -> Counts:
    """Count a step of `config`.

    Raises:
        ValueError: its method's step has no fixed size.
    """
    train = config.train
    return _count(config.model, config.augment.size, train.precision, train.activation_checkpointing)


@lru_cache(maxsize=64)
def _count(model: ModelConfig, size: int, precision: str, recomputed: bool) -> Counts:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        try:
            method = build_method(model, seed=0).to(dtype).train()
        except RuntimeError as error:  # sizes beyond 64 bits
            width = model.encoder.width
            raise ValueError(f"`--width` must be one that memory could hold, got {width:g}") from error
        if isinstance(method, Distill):
            raise ValueError("`model.method` must be simclr or supervised to be planned, got distill")
        views = [torch.empty(NUM_IMAGES, 3, size, size, dtype=dtype) for _ in range(method.num_views)]
    calls, saved = _Calls(), _Saved(method)
    with FlopCounterMode(display=False) as flops, calls, saved.recording():
        projections = method.project(views)
        torch.stack([projection.float().sum() for projection in projections]).sum().backward()  # type: ignore[no-untyped-call]
    norms = [module for module in method.modules() if isinstance(module, GlobalBatchNorm)]
    total = flops.get_total_flops() / NUM_IMAGES
    kept, inside = saved.by_block.get(NO_BLOCK, 0), 0
    blocks = [value for name, value in saved.by_block.items() if name != NO_BLOCK]
    if recomputed:
        kept, inside = kept + saved.block_inputs, max(blocks)
        total *= 4 / 3  # backward is two forwards, and one forward comes to it
    else:
        kept += sum(blocks)
    return Counts(
        flops_per_image=total,
        activation_bytes_per_image=kept / NUM_IMAGES,
        recomputed_bytes_per_image=inside / NUM_IMAGES,
        parameters=sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad),
        operations=calls.number,
        norm_layers=len(norms),
        norm_bytes=sum(4 * (2 * norm.num_features + 1) for norm in norms),
        out_dim=projections[0].shape[1],
        num_views=method.num_views,
    )


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are more than another view of the same storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


class _Saved:
    """Bytes of storages that autograd keeps, each once, by the residual block that saved it first."""

    def __init__(self, method: Method) -> None:
        self.by_block: dict[str, int] = {}
        self.block_inputs = 0
        self._method, self._block = method, NO_BLOCK
        self._known: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets its address
        for parameter in method.parameters():
            storage = parameter.untyped_storage()
            self._known[storage._cdata] = storage

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While a forward pass goes on."""
        encoder = self._method.encoder
        stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        handles = []
        for i, stage in enumerate(stages):
            for j, block in enumerate(stage):
                handles.append(block.register_forward_pre_hook(self._enter(f"{i}.{j}")))
                handles.append(block.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._block = name
            self.block_inputs += inputs[0].nbytes

        return hook

    def _leave(self, *_: Any) -> None:
        self._block = NO_BLOCK

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage
            self.by_block[self._block] = self.by_block.get(self._block, 0) + storage.nbytes()
        return tensor
