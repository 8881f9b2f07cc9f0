"""NT-Xent's rows in torch, fp32 or fp64: from projections to u, and from dL/du back to them.

`to_rows` and `to_input` are what every form of rows has; `model.ntxent.autograd` says what they are for.

Shapes: N images; R = 2N rows of this rank (view 1, then view 2); D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.similarity import chain_to_input_, positive_similarities, scaled_rows

Kept = tuple[Tensor | None, ...]


def to_rows(z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor, Kept]:
    """Rows as a backend's passes take them [R, …]; s of each row's positive [R]; what `to_input` needs beside them."""
    u, norms = scaled_rows(z1, z2, temperature, normalize)
    return u, positive_similarities(u), (norms,)


def to_input(
    grad: Tensor, u: Tensor, kept: Kept, margin: Tensor, upstream: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """dL/dz [R, D] and, if τ is a tensor, dL/dτ.

    Args:
        grad: of a backend's `gradient`; overwritten.
        u: of `to_rows`.
        kept: of `to_rows`.
        margin: x of `model.ntxent.autograd` [R].
        upstream: dL/d(loss), a scalar.
        temperature: τ.
    """
    pull = torch.sigmoid(margin).view(2, -1, 1).sum(0)
    for grad_view, other in zip(grad.chunk(2), reversed(u.chunk(2)), strict=True):
        grad_view.addcmul_(pull, other, value=-1)
    grad *= upstream / len(margin)
    (norms,) = kept
    temperature_grad = chain_to_input_(grad, u, norms, temperature)
    return grad, temperature_grad if isinstance(temperature, Tensor) else None
