"""What a self-supervised method is to the training loop: views in, loss and metrics out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from model.resnet import ResNet


class Method(nn.Module, ABC):
    """An encoder, what is trained with it, and the loss between views.

    A step has two halves, which a training step may run apart: `project` takes each image by itself (but for batch
    norm), `loss` sees the projections of the whole batch.

    Attributes:
        encoder: the network whose representation h is evaluated and exported.
        num_views: views of each image that `forward` takes.
    """

    encoder: ResNet
    num_views: int

    @abstractmethod
    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Views [N, 3, H, W] of N images → what the loss compares, [N, D] for each view. All ranks must call."""

    @abstractmethod
    def loss(self, projections: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Projections of this rank's images → the scalar loss, and detached scalars to log.

        All ranks must call together. Loss and metrics are means over this rank's rows: their mean over the
        ranks is the global figure, and gradients averaged over the ranks are the global loss's.
        """

    def forward(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Views [N, 3, H, W] of this rank's N images → `loss` of their projections."""
        return self.loss(self.project(views))

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step `step`, for moving averages and queues; default: nothing."""
