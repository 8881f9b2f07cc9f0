"""Trade time for memory: keep each residual block's input alone, and compute its activations again in the backward.

Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, as torch.utils.checkpoint does
it. The gradients are those without it, bit for bit on a CPU; the forward passes of the blocks are run twice.

The second pass leaves the running statistics of batch norm alone, which the first has updated. Where batch norm
communicates, its collectives run again too: on all ranks in the same order, which is that of their one backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.resnet import ResNet


def checkpoint_activations(encoder: ResNet) -> None:
    """Have every residual block recompute its activations; names, results and hooks stay as they are.

    In place, once for an encoder, and before it is compiled. Passes without gradients, and evaluation, cost nothing
    more.
    """
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in stage:
            block.forward = _Recomputed(block)


class _Recomputed:
    """The forward pass of a block, in place of its own; a copy of the block takes its copy along."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, x: Tensor) -> Tensor:
        """What the block gives."""
        block = self._block
        # There is nothing random in a block, hence no state to bring back.
        recompute = partial(checkpoint, partial(type(block).forward, block), use_reentrant=False)
        if not torch.compiler.is_compiling():
            recompute = partial(recompute, preserve_rng_state=False, context_fn=partial(_contexts, block))
        output: Tensor = recompute(x)
        return output


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass, and around the second."""
    return nullcontext(), _copied_buffers(block)


@contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """What happens to buffers happens to copies, which are forgotten. Left out, they would not be saved alike."""
    own = [(module, dict(module._buffers)) for module in block.modules()]
    for module, buffers in own:
        module._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)
