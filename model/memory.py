"""A memory of keys: a network that follows the trained one, and a queue of what it said of earlier batches.

Sources: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", algorithm 1, and its
`moco/builder.py`; SimCLR v2 (Chen et al. 2020) takes it over with a moving average of 0.999 and a buffer of 64 K.

    θ_k ← m·θ_k + (1 − m)·θ       after every optimizer step, for the weights; batch norm's running statistics are the
                                  memory network's own
    queue ← the keys of this step, in place of the oldest

The memory network sees training batches, with the statistics of the whole batch, as the trained network does: so MoCo's
shuffling of batch norm has nothing to hide.

Legend: N images of this rank, R = 2N rows (view 1, then view 2), W ranks, K places, D width of a projection.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.heads import ProjectionHead
from model.resnet import ResNet


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """SimCLR v2's memory: more negatives than a batch has."""

    size: int = 0
    """Keys of earlier batches that serve as negatives; 0: no memory. SimCLR v2: 65536, eight batches of 4096 images."""
    ema_decay: float = 0.999
    """Share of its weights that the memory network keeps in a step."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"`model.memory.size` must be at least 0 (none), got {self.size}; SimCLR v2 has 65536")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"`model.memory.ema_decay` must be in [0, 1), got {self.ema_decay}; SimCLR v2 has 0.999")


class Memory(nn.Module):
    """The memory network and its queue. Its weights are parameters without gradients, and in the `state_dict`.

    Ranks hold the same memory, since they hold the same weights and push the same keys.

    Args:
        config: with a size of at least 1.
        encoder: of the trained network, which the memory network starts as a copy of.
        projection_head: likewise.
        dim: D.

    Attributes:
        queue: the keys [K, D]; places that were never written count for nothing.
        num_pushed: int64 scalar, keys that ever came; the next one's place is `num_pushed % K`.
    """

    queue: Tensor
    num_pushed: Tensor

    def __init__(self, config: MemoryConfig, encoder: ResNet, projection_head: ProjectionHead, dim: int) -> None:
        super().__init__()
        self.decay = config.ema_decay
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.projection_head = copy.deepcopy(projection_head).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(config.size, dim))
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.int64))

    def start(self, encoder: nn.Module, projection_head: nn.Module) -> None:
        """Begin anew as a copy of these networks, with nothing in the queue."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.projection_head.load_state_dict(projection_head.state_dict())
        self.queue.zero_()
        self.num_pushed.zero_()

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Images [R, 3, H, W] → projections [R, D] by the memory network, without a graph. All ranks must call."""
        keys: Tensor = self.projection_head(self.encoder(images))
        return keys

    def filled(self) -> Tensor:
        """Which places of the queue hold a key: bool [K]."""
        return torch.arange(len(self.queue), device=self.queue.device) < self.num_pushed

    @torch.no_grad()
    def push(self, keys: Tensor, left_out: Tensor | None = None) -> None:
        """Put keys [n, D] in place of the oldest; of more than K, the last K stay. The host waits for no device.

        Args:
            keys: the same on all ranks.
            left_out: bool scalar on the device; where it is true, nothing changes.
        """
        kept = keys[-len(self.queue) :]
        skipped = len(keys) - len(kept)
        places = (self.num_pushed + torch.arange(skipped, len(keys), device=keys.device)) % len(self.queue)
        kept, count = kept.to(self.queue.dtype), torch.full_like(self.num_pushed, len(keys))
        if left_out is not None:
            kept, count = torch.where(left_out, self.queue[places], kept), torch.where(left_out, 0, count)
        self.queue.index_copy_(0, places, kept)
        self.num_pushed += count

    @torch.no_grad()
    def follow(self, encoder: nn.Module, projection_head: nn.Module, left_out: Tensor | None = None) -> None:
        """Move the weights towards those of the trained network; `left_out` as in `push`."""
        ours = [*self.encoder.parameters(), *self.projection_head.parameters()]
        theirs = [*encoder.parameters(), *projection_head.parameters()]
        share: float | Tensor = 1 - self.decay
        if left_out is not None:
            share = torch.where(left_out, 0.0, share).to(ours[0].dtype)
        for own, value in zip(ours, theirs, strict=True):
            own.lerp_(value, share)
