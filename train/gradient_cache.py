"""Exact contrastive gradients of a batch that does not fit: forward twice, in micro-batches (GradCache).

Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
A contrastive loss needs the projections of the whole batch, which are small; what does not fit is the network's
activations:

    1. project every micro-batch without a graph, and keep the projections z
    2. the loss of all z, and its gradients dL/dz, and dL/dp for parameters p of the loss itself
    3. project every micro-batch again, with a graph, and go backward through Σ ⟨z, dL/dz⟩

Summed over the micro-batches, 3 is the gradient of the loss in 2, whatever their size; plain accumulation of losses
would have known the negatives within a micro-batch alone. What does differ is batch norm, whose statistics are those
of one micro-batch of all ranks: docs/guides/large_batches.md says by how much.

Shapes: N images on this rank, n in a micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.methods.base import Method


class LossGradients(NamedTuple):
    """The loss of a batch and its gradients, before they go through the network."""

    loss: Tensor
    metrics: dict[str, Tensor]
    by_projection: list[Tensor]
    """dL/dz [N, D], one a view."""
    by_parameter: dict[str, Tensor]
    """dL/dp for the parameters that the loss itself uses, by name in the method."""


class Cotangents(NamedTuple):
    """Gradients that a micro-batch takes through the network."""

    by_projection: list[Tensor]
    """dL/dz [n, D], one a view."""
    by_parameter: dict[str, Tensor]
    """dL/dp by name: given to one micro-batch of the batch alone."""


def micro_batches(views: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The views [N, …] in pieces of `size` images."""
    return (list(piece) for piece in zip(*(torch.split(view, size) for view in views), strict=True))


@torch.no_grad()
def cached_projections(method: Method, views: list[Tensor], size: int) -> list[Tensor]:
    """Projections [N, D] of every view, without a graph. All ranks must call.

    Buffers end as they were: the pass that follows, with a graph, is the one that counts for running statistics.
    """
    buffers = list(method.buffers())
    before = [buffer.clone() for buffer in buffers]
    pieces = [method.project(piece) for piece in micro_batches(views, size)]
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return [torch.cat(view) for view in zip(*pieces, strict=True)]


def loss_gradients(method: Method, projections: list[Tensor], labels: Tensor | None = None) -> LossGradients:
    """The loss of all projections [N, D] (and labels [N]), and its gradients. All ranks must call."""
    with torch.enable_grad():
        leaves = [projection.detach().requires_grad_() for projection in projections]
        loss, metrics = method.loss(leaves, labels)
        parameters = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(loss, [*leaves, *parameters.values()], allow_unused=True)
    by_projection = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=False)
    ]
    named = zip(parameters, gradients[len(leaves) :], strict=True)
    by_parameter = {name: gradient for name, gradient in named if gradient is not None}
    return LossGradients(loss.detach(), metrics, by_projection, by_parameter)


def surrogate(method: Method, projections: list[Tensor], given: Cotangents) -> Tensor:
    """Σ ⟨z, dL/dz⟩ + Σ ⟨p, dL/dp⟩: a scalar whose gradient is that of the loss.

    Args:
        method: whose parameters `given` names.
        projections: of a micro-batch, with a graph.
        given: what is to arrive at them.
    """
    pairs = [*zip(projections, given.by_projection, strict=True)]
    pairs += [(method.get_parameter(name), gradient) for name, gradient in given.by_parameter.items()]
    return torch.stack([_inner_product(value, gradient) for value, gradient in pairs]).sum()


def _inner_product(value: Tensor, gradient: Tensor) -> Tensor:
    """In float32, or float64 where the value is float64."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    return (value.to(dtype) * gradient.to(dtype)).sum()
