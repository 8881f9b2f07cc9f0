"""A linear classifier that is trained beside the encoder, on its detached representations, and tells how good they are.

As google-research/simclr trains its own (`tf2/model.py`: a Dense layer with bias on `stop_gradient` of h, every view
with its image's label, momentum SGD without LARS's adaptation) and solo-learn (`solo/methods/base.py`: `nn.Linear` on
`feats.detach()`, a `classifier_lr` of its own, no weight decay). Ours differs in three things:

- The gradient is divided by the mean of ‖(h, 1)‖², which bounds the loss's curvature. ‖h‖² grows with the width of the
  encoder and while it learns: one plain rate that is best on a narrow network swings on a wide one.
- The rate is constant, and nothing decays: the probe need not know how long the run is.
- It starts from zero: the problem is convex, there is no symmetry to break. The first loss is log C, nothing is drawn.

Legend: N local images in V views, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.collectives import all_reduce_sum_
from pipelines.beton import Beton
from pipelines.build import ImageFolder
from train.online.representation_tap import labels_of_rows

UNLABELLED = -1
MAX_CLASSES = 100_000  # beyond ImageNet-21k; a label may be any 64-bit number, and each class costs memory
MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name for it


def count_classes(data: Beton | ImageFolder) -> int:
    """C of the set that is trained on.

    Raises:
        ValueError: it has no labels.
    """
    if isinstance(data, ImageFolder):
        from pipelines.folder_dataset import list_images  # needs Pillow and torchvision, as no other loader does

        return max(label for _, label in list_images(data.root)) + 1
    labels = data.labels
    if labels is None or not 0 <= labels.max() < MAX_CLASSES or labels.min() < UNLABELLED:
        found = "none" if labels is None else f"{labels.min()} to {labels.max()}"
        raise ValueError(
            f"`online.linear_probe` needs labels from 0 to at most {MAX_CLASSES - 1} in {data.path}, found {found}; "
            "convert a folder with one folder for each class, or set `online.linear_probe` to false"
        )
    return int(labels.max()) + 1


class LinearProbe:
    """logits = W h + b, in float32; the same on all ranks.

    Args:
        width: D.
        num_classes: C; labels are 0 to C − 1, or −1 where there is none.
        lr: learning rate, constant; steps are stable up to about 4 (1 + momentum).
        momentum: of SGD.
        device: where representations are.
    """

    def __init__(self, width: int, num_classes: int, *, lr: float, momentum: float, device: torch.device) -> None:
        self._parameters = {
            "weight": nn.Parameter(torch.zeros(num_classes, width, device=device)),
            "bias": nn.Parameter(torch.zeros(num_classes, device=device)),
        }
        self._optimizer = torch.optim.SGD(self._parameters.values(), lr=lr, momentum=momentum)
        for parameter in self._parameters.values():  # from the start, so that the state is always whole
            self._optimizer.state[parameter] = {MOMENTUM: torch.zeros_like(parameter)}

    def step(self, representations: list[Tensor] | Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step on the labelled rows of all ranks. All ranks must call; nobody waits for a device.

        A step whose representations are not finite on some rank gives no gradient on any: the probe goes on where the
        run does.

        Args:
            representations: of this rank's images, [V·N, D], or in pieces as `RepresentationTap.take` gives them.
            labels: integers [N] on their device.

        Returns:
            `probe_loss`, the mean cross-entropy, and `probe_accuracy`, the share of rows in [0, 1] whose largest logit
            is their label's; both before the step, over the labelled rows of all ranks: NaN where there are none.
        """
        pieces = [representations] if isinstance(representations, Tensor) else representations
        of_rows = labels_of_rows(pieces, labels)
        with torch.enable_grad(), torch.autocast(labels.device.type, enabled=False):
            h = torch.cat(pieces).detach().float()
            logits = F.linear(h, **self._parameters)
            loss = F.cross_entropy(logits, of_rows, ignore_index=UNLABELLED, reduction="sum")
            gradients = torch.autograd.grad(loss, list(self._parameters.values()))
        labelled = of_rows != UNLABELLED
        num_correct = (logits.detach().argmax(dim=1) == of_rows).sum()
        squares = (h.square().sum(dim=1) + 1) * labelled
        sums = torch.stack([loss.detach(), num_correct.float(), labelled.sum().float(), squares.sum()])
        sums = all_reduce_sum_(torch.cat([sums, *(gradient.flatten() for gradient in gradients)]))
        gradient = sums[4:] / sums[3].clamp(min=1)
        self._descend(torch.where(gradient.isfinite().all(), gradient, 0.0))
        return {"probe_loss": sums[0] / sums[2], "probe_accuracy": sums[1] / sums[2]}

    def _descend(self, gradient: Tensor) -> None:
        """By the gradient of both parameters, one after the other, [C·D + C]."""
        parameters = list(self._parameters.values())
        pieces = torch.split(gradient, [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """`weight` and `bias`, and the momentum of each: the probe's own tensors, which the next step changes."""
        state = {name: parameter.detach() for name, parameter in self._parameters.items()}
        momentum = {
            f"{name}.momentum": self._optimizer.state[parameter][MOMENTUM]
            for name, parameter in self._parameters.items()
        }
        return state | momentum

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is of another number of classes or another encoder; nothing is changed then.
        """
        own = self.state_dict()
        shapes, found = ({name: list(value.shape) for name, value in sizes.items()} for sizes in (own, state))
        if shapes != found:
            raise ValueError(
                f"the checkpoint's online probe must have the tensors {shapes}, got {found}; resume with the labels "
                "that the run was started with, or with `online.linear_probe` false"
            )
        for name, value in own.items():
            value.copy_(state[name])
