"""SimCLR with a memory, as SimCLR v2 pretrains: queries of the trained network against keys of a slower one.

Each view of an image is a query. Its positive is the memory network's key of the other view; its negatives are the keys
of all other images of the global batch, and those that the memory still holds of earlier batches. The loss stands in
`model.losses.memory_nt_xent`, the memory in `model.memory`.

`project` gives the keys beside the queries, so that a step in micro-batches knows the keys of its whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import collectives
from model.heads import ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss
from model.losses.memory_nt_xent import memory_nt_xent, unit_rows
from model.memory import Memory, MemoryConfig
from model.methods.simclr import SimCLR, projection_std
from model.resnet import EncoderConfig


class SimCLRWithMemory(SimCLR):
    """SimCLR whose contrasting examples are keys.

    Args:
        encoder: of the trained network.
        projection_head: of the trained network.
        loss: NT-Xent, for its temperature and its normalisation.
        memory: of at least one key.

    Raises:
        ValueError: see `check_memory`.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        projection_head: ProjectionHeadConfig,
        loss: ContrastiveLoss,
        memory: MemoryConfig,
    ) -> None:
        super().__init__(encoder, projection_head, loss)
        check_memory(memory, loss=loss.name, exchange=loss.exchange)
        dim = projection_head.out_dim if projection_head.num_layers else self.encoder.feature_dim
        self.memory = Memory(memory, self.encoder, self.projection_head, dim)
        self._new_keys: Tensor | None = None  # of the last loss: the global batch's, view by view

    def weights_replaced(self) -> None:
        """To be called when other weights than those of `__init__` were loaded: the memory starts over from them."""
        self.memory.start(self.encoder, self.projection_head)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Projections of both views, then the keys of both; see `Method.project`."""
        projections = super().project(views)
        return [*projections, *self.memory.keys(torch.cat(views)).chunk(2)]

    def loss(self, projections: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `SimCLR.loss`. The batch's keys enter the memory in `after_step`."""
        num_images, normalize = len(projections[0]), self.contrastive_loss.normalize
        queries = torch.cat(projections[:2])
        temperature = self.contrastive_loss.temperature()
        with torch.autocast(queries.device.type, enabled=False):
            keys = collectives.all_gather_rows(unit_rows(torch.cat(projections[2:]).detach(), normalize))
            self._new_keys = keys.view(-1, 2, num_images, keys.shape[1]).transpose(0, 1).flatten(0, 2)
            output = memory_nt_xent(
                unit_rows(queries, normalize),
                keys,
                self.memory.queue,
                self.memory.filled(),
                temperature=temperature,
            )
        metrics = {"contrastive_accuracy": output.contrastive_accuracy, "projection_std": projection_std(queries)}
        if isinstance(temperature, Tensor):
            metrics["temperature"] = temperature.detach()
        return output.loss, metrics

    def after_step(self, step: int, left_out: Tensor | None = None) -> None:
        """Let the memory network follow, and the last batch's keys into the queue.

        Args:
            step: of the optimizer.
            left_out: bool scalar on the device: whether that step moved nothing; then nothing moves here.
        """
        assert self._new_keys is not None, "a step has a loss"
        self.memory.follow(self.encoder, self.projection_head, left_out)
        self.memory.push(self._new_keys, left_out)
        self._new_keys = None


def check_memory(memory: MemoryConfig, *, loss: str, exchange: str) -> None:
    """Refuse a memory beside what it does not go with, named as in the configuration.

    Raises:
        ValueError: as said, in one line.
    """
    if memory.size and loss != "nt_xent":
        raise ValueError(f"`model.memory.size` needs `model.loss` nt_xent, got {loss!r}; set one of them otherwise")
    if memory.size and exchange != "all_gather":
        raise ValueError(
            f"`model.memory.size` needs `model.exchange` all_gather, got {exchange!r}: all ranks keep the keys of all"
        )
