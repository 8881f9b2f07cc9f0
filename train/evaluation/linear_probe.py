"""Many linear classifiers trained at once on the same representations, by SGD with Nesterov momentum.

The linear evaluation of SimCLR v1 (appendix B.6): softmax regression on h, Nesterov momentum 0.9, rate 0.1·B/256 along
half a cosine to 0, no warm-up, no weight decay. Weights start from 0, as google-research/simclr's
commands for it ask (`--zero_init_logits_layer=True --optimizer=momentum --warmup_epochs=0`).

A head is one learning rate and one weight decay. All heads stand in one matrix [H·C, D], so that logits and gradients
of all of them are one product each. No head reads what is another's: one that diverges leaves the others as they are.

Each update is that of `torch.optim.SGD(nesterov=True)`, with the decay of the weights alone:

    g ← ∇mean CE + λW        v ← μv + g        W ← W − lr·(g + μv)

Legend: H heads, N local rows of a batch, D width, C classes, B rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.collectives import all_reduce_sum_
from train.schedule import ScheduleConfig, learning_rate

BATCH_OF_BASE_LR = 256
LOGIT_BYTES = 64 * 2**20  # of logits held at a time: ImageNet's classes, 40 heads and 4,096 rows would be 625 MiB
SCHEDULE = ScheduleConfig(warmup_epochs=0)


@dataclass(frozen=True, kw_only=True)
class Head:
    """How one classifier is trained."""

    base_lr: float
    """Learning rate per 256 rows of the global batch, at the start."""
    weight_decay: float
    """λ of ½λ‖W‖²; the bias is not decayed."""
    skips_held_out: bool = False
    """Whether rows that are held out for validation give no gradient."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One rank's share of a global batch.

    Attributes:
        x: representations, float32 [N, D], on the device.
        labels: int64 [N], from 0, on the device.
        indices: int64 [N], rows of the set, on the CPU.
    """

    x: Tensor
    labels: Tensor
    indices: Tensor


class Feed(Protocol):
    """Where the rows of an epoch come from."""

    global_batch_size: int
    """B."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """The batches of one epoch."""


class LinearHeads:
    """logits = W h + b for each head, in float32; the same on all ranks.

    Args:
        heads: H of them.
        width: D.
        num_classes: C.
        momentum: μ.
        init_std: of the normal distribution that weights start from, the same for all heads; biases start from 0.
        seed: of that start.
        device: where representations are.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        width: int,
        num_classes: int,
        *,
        momentum: float = 0.9,
        init_std: float = 0.0,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.heads, self.momentum = tuple(heads), momentum
        count, device = len(heads), device or torch.device("cpu")
        start = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)) * init_std
        self.weight = start.to(device).repeat(count, 1, 1)  # [H, C, D]
        self.bias = torch.zeros(count, num_classes, device=device)
        self._velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        # One tensor, since it is what ranks add up: gradients of weights and biases, and for each head its loss and
        # the rows that it learned from.
        sizes = [self.weight.numel(), self.bias.numel(), count, count]
        self._sums = torch.zeros(sum(sizes), device=device)
        weight, bias, self._loss, self._rows = torch.split(self._sums, sizes)
        self._gradients = [weight.view_as(self.weight), bias.view_as(self.bias)]
        self._base_lr = torch.tensor([head.base_lr for head in heads], device=device)
        self._decay = torch.tensor([head.weight_decay for head in heads], device=device).view(-1, 1, 1)
        self._decays = any(head.weight_decay for head in heads)
        self._skips = torch.tensor([head.skips_held_out for head in heads], device=device)

    def step(self, x: Tensor, labels: Tensor, held_out: Tensor | None = None, *, lr_factor: float) -> Tensor:
        """One update of every head, by the rows of all ranks. All ranks must call.

        Args:
            x: representations of this rank, float32 [N, D].
            labels: int64 [N], from 0.
            held_out: bool [N]: rows that heads with `skips_held_out` do not learn from; None: there are none.
            lr_factor: what each head's `base_lr` is multiplied by.

        Returns:
            Mean cross-entropy of each head before the update, over the rows that it learned from, [H].
        """
        self._sums.zero_()
        pieces = max(1, LOGIT_BYTES // (self.bias.numel() * self.bias.element_size()))
        for begin in range(0, len(x), pieces):
            rows = slice(begin, begin + pieces)
            self._add(x[rows], labels[rows], None if held_out is None else held_out[rows])
        all_reduce_sum_(self._sums)
        rows_seen = self._rows.clamp(min=1)  # a batch may be held out as a whole: no gradient
        self._update(rows_seen, self._base_lr * lr_factor)
        return self._loss / rows_seen

    def _add(self, x: Tensor, labels: Tensor, held_out: Tensor | None) -> None:
        """Add the sums over some rows: ∂(Σ CE)/∂logits is softmax − one-hot."""
        num_heads, num_classes, width = self.weight.shape
        logits = torch.addmm(self.bias.flatten(), x, self.weight.view(-1, width).T)
        log_p = logits.view(len(x), num_heads, num_classes).log_softmax(dim=2)  # [N, H, C]
        row = torch.arange(len(x), device=x.device)
        loss = -log_p[row, :, labels]  # [N, H]
        error = log_p.exp_()
        error[row, :, labels] -= 1
        if held_out is None:
            self._rows += len(x)
        else:
            skipped = held_out[:, None] & self._skips  # [N, H]
            error.masked_fill_(skipped[:, :, None], 0.0)
            loss = loss.masked_fill(skipped, 0.0)
            self._rows += (~skipped).sum(dim=0)
        self._loss += loss.sum(dim=0)
        weight, bias = self._gradients
        weight.view(-1, width).addmm_(error.view(len(x), -1).T, x)
        bias += error.sum(dim=0)

    def _update(self, rows_seen: Tensor, lr: Tensor) -> None:
        parameters = (self.weight, self.bias)
        for parameter, gradient, velocity in zip(parameters, self._gradients, self._velocities, strict=True):
            of_head = (-1, *[1] * (parameter.ndim - 1))
            gradient.div_(rows_seen.view(of_head))
            if self._decays and parameter is self.weight:
                gradient.add_(self._decay * parameter)
            velocity.mul_(self.momentum).add_(gradient)
            gradient.add_(velocity, alpha=self.momentum)
            parameter.addcmul_(lr.view(of_head), gradient, value=-1)

    def scores(self, x: Tensor, head: int) -> Tensor:
        """Logits of one head, float32 [N, C], on the device of `x`."""
        return torch.addmm(self.bias[head].to(x.device), x, self.weight[head].to(x.device).T)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, biases and their momentum: the heads' own tensors, which the next step changes."""
        velocities = dict(zip(("weight.momentum", "bias.momentum"), self._velocities, strict=True))
        return {"weight": self.weight, "bias": self.bias} | velocities

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave for the same heads."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def diverged(self) -> list[bool]:
        """For each head, whether a weight of it is NaN or infinite."""
        finite = self.weight.isfinite().flatten(1).all(dim=1) & self.bias.isfinite().all(dim=1)
        return (~finite).tolist()


def train_heads(
    heads: LinearHeads,
    feed: Feed,
    *,
    epochs: int,
    held_out: Tensor | None = None,
    start_epoch: int = 0,
    after_epoch: Callable[[int, list[float]], None] | None = None,
) -> None:
    """Train on every batch of every epoch. All ranks must call.

    The schedule moves with each step: the first one has the whole rate, and the one after the last would have 0.

    Args:
        heads: are changed.
        feed: of this rank's rows.
        epochs: to train for.
        held_out: bool [n], for each row of the set; None: no head skips any.
        start_epoch: epochs that are done.
        after_epoch: is told the epochs that are done, and each head's mean training loss over the last of them.
    """
    total_steps, step = epochs * len(feed), start_epoch * len(feed)
    scale = feed.global_batch_size / BATCH_OF_BASE_LR
    for epoch in range(start_epoch, epochs):
        losses = torch.zeros(len(heads.heads), device=heads.bias.device)
        for rows in feed.epoch(epoch):
            factor = learning_rate(
                step, config=SCHEDULE, peak_lr=scale, total_steps=total_steps, steps_per_epoch=len(feed)
            )
            masked = None if held_out is None else held_out[rows.indices].to(rows.x.device)
            losses += heads.step(rows.x, rows.labels, masked, lr_factor=factor)
            step += 1
        if after_epoch is not None:
            after_epoch(epoch + 1, (losses / len(feed)).tolist())
