"""NT-Xent of other packages: their own classes, called as their documentation does.

- `lightly`: `NTXentLoss` without a memory bank; one cross entropy over rows of logits with the row itself cut out.
- `metric_learning`: pytorch-metric-learning's `NTXentLoss` within its `SelfSupervisedLoss`. It compares each of the 2N
  positive pairs with the list of all 2N (2N − 2) negative pairs: its memory is cubic in N.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

NTXent = Callable[[Tensor, Tensor], Tensor]
"""The two views' projections [N, D] → the loss."""


def lightly(temperature: float) -> NTXent:
    """The paper's loss."""
    from lightly.loss import NTXentLoss  # seconds to import, and an optional package

    loss: NTXent = NTXentLoss(temperature)
    return loss


def metric_learning(temperature: float) -> NTXent:
    """The paper's loss."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss  # an optional package

    loss: NTXent = SelfSupervisedLoss(NTXentLoss(temperature))
    return loss
