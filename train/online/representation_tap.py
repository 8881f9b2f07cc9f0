"""Keeps what a network puts out while it is trained, without a second pass and without a trace in its gradients.

Legend: N local images in V views, n in a micro-batch, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RepresentationTap:
    """Listens to the training passes of a network: its encoder, or its projection head.

    A pass counts that trains: in training mode and with a graph. So under micro-batches (`train.gradient_cache`), whose
    first pass has no graph, every image counts once; passes of an evaluation do not count. The hook stands outside of
    the network's `forward`: that may be compiled, or compute its inside twice.

    Args:
        network: whose output [rows, D] is kept.
    """

    def __init__(self, network: nn.Module) -> None:
        self._kept: list[Tensor] = []
        self._hook = network.register_forward_hook(self._keep)

    def take(self) -> list[Tensor]:
        """The outputs since the last call, one a micro-batch, float32 [V·n, D], views one after the other.

        Copies, detached: the memory of the step itself is not held. To be called once a step, or they add up.
        """
        kept, self._kept = self._kept, []
        return kept

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._hook.remove()
        self._kept = []

    def _keep(self, network: nn.Module, _: Any, output: Tensor) -> None:
        if network.training and torch.is_grad_enabled():
            self._kept.append(output.detach().to(torch.float32, copy=True))


def labels_of_rows(representations: list[Tensor], labels: Tensor) -> Tensor:
    """The label of every row: micro-batch by micro-batch, in each as often as there are views.

    Args:
        representations: from `RepresentationTap.take`, [V·n, D] each.
        labels: of the step's images, [N], N = Σ n.

    Returns:
        [V·N], in the order of the rows.
    """
    num_rows = sum(len(rows) for rows in representations)
    num_views, rest = divmod(num_rows, len(labels))
    assert rest == 0, f"{num_rows} rows of {len(labels)} images"
    pieces = torch.split(labels, [len(rows) // num_views for rows in representations])
    return torch.cat([piece.repeat(num_views) for piece in pieces])
