"""SimCLR (Chen et al. 2020): two views, one encoder and projection head, NT-Xent over the global batch.

Both views go through the network as one batch of 2N rows, so that batch norm sees both, as in
google-research/simclr.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.heads import ProjectionHead, ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss
from model.methods.base import Method
from model.resnet import EncoderConfig, ResNet


class SimCLR(Method):
    """loss(g(f(view 1)), g(f(view 2))), where the loss is NT-Xent or one that the paper compares it with."""

    num_views = 2

    def __init__(self, encoder: EncoderConfig, projection_head: ProjectionHeadConfig, loss: ContrastiveLoss) -> None:
        super().__init__()
        self.encoder = ResNet(encoder)
        self.projection_head = ProjectionHead(self.encoder.feature_dim, projection_head)
        self.contrastive_loss = loss

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """See `Method.project`."""
        if len(views) != self.num_views:
            raise ValueError(f"SimCLR takes {self.num_views} views of each image, got {len(views)}")
        return list(self.projection_head(self.encoder(torch.cat(views))).chunk(2))

    def loss(self, projections: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Method.loss`; without labels. The metrics are explained at `ContrastiveLoss` and `projection_std`."""
        loss, metrics = self.contrastive_loss(*projections)
        return loss, metrics | {"projection_std": projection_std(torch.cat(projections))}


@torch.no_grad()
def projection_std(z: Tensor) -> Tensor:
    """How far the projections z [N, D] are from collapse: 0 where all coincide, 1 where they fill the sphere.

    The standard deviation over this rank's rows of each dimension of √D·z/‖z‖, averaged over the dimensions.
    """
    unit = F.normalize(z.float(), dim=1)
    return unit.std(dim=0, correction=0).mean().mul(unit.shape[1] ** 0.5)
