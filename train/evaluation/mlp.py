"""A classifier of two layers on frozen features, trained by Adam: the "additional MLP" of SimCLR v1, table 3.

Legend: m training samples, n test samples, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CHUNK_ROWS = 8192  # classified at a time


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The network, and how it is trained."""

    hidden_dim: int = 512
    """Width between its two layers."""
    epochs: int = 20
    """Passes over the features."""
    lr: float = 1e-3
    """Of Adam; it falls to 0 as a cosine."""
    batch_size: int = 256
    """Features in one step."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`mlp.{name}` must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ValueError(f"`mlp.lr` must be positive, got {self.lr}")


def mlp_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    config: MLPConfig,
    seed: int,
    device: torch.device,
) -> float:
    """Share of test features, in [0, 1], that an MLP of two layers puts into the right class after its last epoch.

    Adam on mini-batches, each feature standardised by its mean and deviation over the training set; one that is
    constant there is only shifted.

    Args:
        train_x: float32 [m, D].
        train_y: int64 [m], below `num_classes`.
        test_x: float32 [n, D].
        test_y: int64 [n].
        num_classes: C.
        config: of the MLP.
        seed: of its initial weights and the order of its batches.
        device: to compute on.
    """
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, correction=0)
    std = torch.where(std > 0.0, std, torch.ones_like(std))
    x, y = ((train_x - mean) / std).to(device), train_y.to(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mlp = nn.Sequential(
            nn.Linear(x.shape[1], config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, num_classes)
        ).to(device)
    num_steps = config.epochs * -(-len(x) // config.batch_size)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(config.epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator).to(device), config.batch_size):
            optimizer.zero_grad()
            cross_entropy(mlp(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        parts = torch.split((test_x - mean) / std, CHUNK_ROWS)
        predicted = torch.cat([mlp(part.to(device)).argmax(dim=1).cpu() for part in parts])
    return float((predicted == test_y).double().mean())
