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
        needs_labels: whether `loss` learns from labels, which every image must then have.
        pretrained: the parts, by the beginnings of their names, that may start from another method's.
        not_adapted: parameters, by the beginnings of their names, whose steps LARS does not scale.
    """

    encoder: ResNet
    num_views: int
    needs_labels: bool = False
    pretrained: tuple[str, ...] = ("encoder.",)
    not_adapted: tuple[str, ...] = ()

    @abstractmethod
    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Views [N, 3, H, W] of N images → what the loss compares, [N, D] for each view. All ranks must call."""

    @abstractmethod
    def loss(self, projections: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Projections of this rank's images, and their labels [N] → the scalar loss, and detached scalars to log.

        All ranks must call together. Loss and metrics are means over this rank's rows: their mean over the
        ranks is the global figure, and gradients averaged over the ranks are the global loss's.
        """

    def forward(self, views: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Views [N, 3, H, W] of this rank's N images, and labels [N] → `loss` of their projections."""
        return self.loss(self.project(views), labels)

    def after_step(self, step: int, left_out: Tensor | None = None) -> None:
        """Called after the optimizer's step `step`, for moving averages and queues; default: nothing.

        Args:
            step: of the optimizer, from 1.
            left_out: bool scalar on the device: whether that step moved nothing; then nothing may move here.
        """

    def weights_replaced(self) -> None:
        """Called when a new run starts from other weights than those of the seed; default: nothing."""
