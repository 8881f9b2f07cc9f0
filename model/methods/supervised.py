"""Supervised training: softmax cross-entropy on the labels, from the encoder or from layers of the projection head.

    x → encoder → the first `head_layers` layers of the projection head → classifier → logits

Without layers of the head this is the supervised baseline, and SimCLR v1's fine-tuning; with one or more it is v2's,
which keeps part of the head (Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners",
section 2). The classifier's weights start as N(0, 0.01²), as google-research/simclr's `SupervisedHead`, its bias as 0.

Legend: N local images, D features before the classifier, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.heads import ProjectionHead, ProjectionHeadConfig
from model.methods.base import Method
from model.resnet import EncoderConfig, ResNet


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The linear classifier of methods that learn from labels."""

    num_classes: int = 1000
    """Classes; labels are below."""
    head_layers: int = 0
    """Layers of the projection head that stay between encoder and classifier: 0 in SimCLR v1, 1 in v2's fine-tuning."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"`model.classifier.num_classes` must be at least 2, got {self.num_classes}")
        if self.head_layers < 0:
            raise ValueError(f"`model.classifier.head_layers` must be at least 0 (none), got {self.head_layers}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"`model.classifier.label_smoothing` must be in [0, 1), got {self.label_smoothing}")


class Supervised(Method):
    """A classifier network and its cross-entropy.

    Args:
        encoder: which encoder.
        projection_head: whose first layers are kept, as `classifier.head_layers` says.
        classifier: what comes after them.

    Raises:
        ValueError: the head has fewer layers than are to be kept.
    """

    num_views = 1
    needs_labels = True
    pretrained = ("encoder.", "projection_head.")
    not_adapted = ("classifier.",)  # google's `head_supervised` is decayed, and not adapted by LARS

    def __init__(
        self, encoder: EncoderConfig, projection_head: ProjectionHeadConfig, classifier: ClassifierConfig
    ) -> None:
        super().__init__()
        check_head_layers(classifier.head_layers, projection_head)
        self.encoder = ResNet(encoder)
        width = self.encoder.feature_dim
        self.projection_head: ProjectionHead | None = None
        if classifier.head_layers > 0:
            self.projection_head = ProjectionHead(width, projection_head)
            del self.projection_head.layers[classifier.head_layers :]
            width = [layer for layer in self.projection_head.modules() if isinstance(layer, nn.Linear)][-1].out_features
        self.classifier = nn.Linear(width, classifier.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.label_smoothing = classifier.label_smoothing

    def logits(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] → [N, C]."""
        h = self.encoder(x)
        if self.projection_head is not None:
            h = self.projection_head(h)
        logits: Tensor = self.classifier(h)
        return logits

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """The logits of the one view; see `Method.project`."""
        if len(views) != self.num_views:
            raise ValueError(f"supervised training takes {self.num_views} view of each image, got {len(views)}")
        return [self.logits(views[0])]

    def loss(self, projections: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; `accuracy` is the share of rows whose largest logit is that of the label."""
        assert labels is not None
        logits = projections[0].float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": accuracy(logits, labels)}


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows [N, C] whose largest logit is that of the label [N]: a scalar on the device."""
    return (logits.argmax(dim=1) == labels).float().mean()


def check_head_layers(head_layers: int, projection_head: ProjectionHeadConfig) -> None:
    """Refuse to keep more layers than there are.

    Raises:
        ValueError: as said.
    """
    if head_layers > projection_head.num_layers:
        raise ValueError(
            f"`model.classifier.head_layers` must be at most the {projection_head.num_layers} layers of "
            f"`model.projection_head`, got {head_layers}"
        )
