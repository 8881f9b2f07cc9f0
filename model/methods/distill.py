"""Distillation: a student learns, on images without labels, what a trained classifier network says of them.

Source: Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners" (SimCLR v2), section 2 and
eq. 2 and 3. With logits t of the teacher and s of the student, P(τ) = softmax(·/τ), and α the weight of the labels:

    distillation_i = −τ² Σ_y P^T(y | x_i; τ) log P^S(y | x_i; τ)
    ∂distillation_i/∂s = τ (softmax(s/τ) − softmax(t/τ))
    loss = (1 − α) · mean of distillation_i over all images + α · mean of the cross-entropy over those with a label

The factor τ² is not in the paper's equations; google-research/simclr has it (colabs/distillation_self_training.ipynb,
`add_kd_loss`), after Hinton et al. 2015: the gradient keeps its size when τ grows. Eq. 3 sums where this takes means:
so the weight of the labels does not depend on how few there are.

The teacher is no part of the student: not among its parameters, nor in its `state_dict()`.

Legend: N local images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import collectives
from model.heads import ProjectionHeadConfig
from model.methods.supervised import ClassifierConfig, Supervised
from model.resnet import EncoderConfig

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student learns from its teacher, and what from labels."""

    temperature: float = 1.0
    """τ: SimCLR v2 has 0.1 for a student of its teacher's architecture, 1.0 for a smaller one."""
    label_weight: float = 0.0
    """α: weight of the cross-entropy on the images that have a label; 1 − α is that of distillation. 0: labels are not
    looked at, as in most of SimCLR v2's experiments."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"`model.distill.temperature` must be finite and above 0, got {self.temperature}; try 1.0")
        if not 0.0 <= self.label_weight < 1.0:
            raise ValueError(
                f"`model.distill.label_weight` must be in [0, 1), got {self.label_weight}; with 1 there is nothing to "
                "distil: take `model.method` supervised"
            )


class Distill(Supervised):
    """A student and its loss; `set_teacher` before the first step.

    Args:
        encoder: of the student.
        projection_head: whose first layers the student keeps.
        classifier: of the student.
        distill: of the loss.

    Raises:
        ValueError: see `Supervised`.
    """

    needs_labels = False  # takes those that there are

    def __init__(
        self,
        encoder: EncoderConfig,
        projection_head: ProjectionHeadConfig,
        classifier: ClassifierConfig,
        distill: DistillConfig,
    ) -> None:
        super().__init__(encoder, projection_head, classifier)
        self.distill = distill
        self._teacher: tuple[Supervised, ...] = ()  # in a tuple, torch does not take it for a part of this module

    def set_teacher(self, teacher: Supervised) -> None:
        """Learn from this network from now on; it is frozen, and goes wherever the student is moved.

        Raises:
            ValueError: it tells another number of classes apart.
        """
        theirs, ours = teacher.classifier.out_features, self.classifier.out_features
        if theirs != ours:
            raise ValueError(
                f"`model.classifier.num_classes` must be the teacher's {theirs}, got {ours}; set it so, or name a "
                "teacher of these classes"
            )
        teacher.requires_grad_(False).eval()
        weight = self.classifier.weight
        self._teacher = (teacher.to(weight.device, weight.dtype),)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """The student's logits of the one view, then the teacher's, without a graph; see `Method.project`."""
        if not self._teacher:
            raise ValueError("distillation needs a teacher: name its run in `train.teacher`")
        (logits,) = super().project(views)
        with torch.no_grad():
            taught = self._teacher[0].logits(views[0])
        return [logits, taught]

    def loss(self, projections: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss above, labels of −1 being none; no image of a batch need have one.

        `agreement` is the share of images that student and teacher assign to the same class; with a weight of the
        labels, `label_loss` is their cross-entropy, and `accuracy` the share that the student has right among them (0
        for a batch without any).
        """
        student, teacher = (logits if logits.dtype == torch.float64 else logits.float() for logits in projections)
        loss = distillation_loss(student, teacher, self.distill.temperature)
        metrics = {"agreement": (student.argmax(1) == teacher.argmax(1)).float().mean()}
        weight = self.distill.label_weight
        if weight > 0.0:
            assert labels is not None
            label_loss, accuracy = labelled_means(student, labels, self.label_smoothing)
            metrics |= {"distillation_loss": loss.detach(), "label_loss": label_loss.detach(), "accuracy": accuracy}
            loss = (1 - weight) * loss + weight * label_loss
        return loss, metrics

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `double`, … are made of."""
        for teacher in self._teacher:
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² · cross-entropy of softmax(student/τ) against softmax(teacher/τ), the mean over the rows: a scalar.

    Args:
        student: logits [N, C].
        teacher: logits [N, C]; no gradient reaches them.
        temperature: τ.
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * F.cross_entropy(student / temperature, target)


def labelled_means(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy (differentiable) and accuracy of the rows with a label, of all ranks, which must all call.

    Each rank's are its rows' sums over the global number of such rows, times the number of ranks: the mean over the
    ranks, of values and of gradients, is that of the global batch. Without any such row both are 0.

    Args:
        logits: [N, C].
        labels: int64 [N]; −1 where there is none.
        label_smoothing: share of the target that is spread over all classes.
    """
    labelled = labels != NO_LABEL
    count = collectives.all_reduce_sum_(labelled.sum().to(logits.dtype)).clamp_(min=1)
    share = collectives.world_size() / count
    total = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum", label_smoothing=label_smoothing)
    right = (logits.argmax(1) == labels).sum()
    return total * share, (right * share).detach()
