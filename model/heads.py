"""The projection head g(·): representation h [N, D] → projection z [N, out_dim], the space of the loss.

Source: google-research/simclr `tf2/model.py`. Every layer is Dense (no bias), then batch norm; all but the
last have scale and offset and a ReLU, the last has a scale alone. SimCLR v1 has 2 layers, v2 has 3. Dense
weights start as N(0, 0.01²), as google's; batch norm hides that scale from the output.
"""

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from model.norm import GlobalBatchNorm1d


@dataclass(frozen=True, kw_only=True)
class ProjectionHeadConfig:
    """The projection head."""

    num_layers: int = 2
    """Number of Dense layers: 2 in SimCLR v1, 3 in v2; 1 is the paper's linear head, 0 none: z is h."""
    hidden_dim: int | None = None
    """Width between the layers; null: the encoder's, as in the paper."""
    out_dim: int = 128
    """Width of the projection z; without layers, z has h's."""

    def __post_init__(self) -> None:
        for name, low in (("num_layers", 0), ("out_dim", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"`model.projection_head.{name}` must be at least {low}, got {getattr(self, name)}")
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"`model.projection_head.hidden_dim` must be null or at least 1, got {self.hidden_dim}")


class ProjectionHead(nn.Module):
    """`layers[k]` is the k-th Dense with its batch norm (and ReLU); v2's fine-tuning keeps the first. None: z = h."""

    def __init__(self, in_dim: int, config: ProjectionHeadConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        if config.num_layers == 0:
            return
        hidden_dim = in_dim if config.hidden_dim is None else config.hidden_dim
        widths = [in_dim, *[hidden_dim] * (config.num_layers - 1), config.out_dim]
        hidden = [
            nn.Sequential(_dense(width_in, width), GlobalBatchNorm1d(width), nn.ReLU(inplace=True))
            for width_in, width in itertools.pairwise(widths[:-1])
        ]
        last = nn.Sequential(_dense(*widths[-2:]), GlobalBatchNorm1d(config.out_dim, bias=False))
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, h: Tensor) -> Tensor:
        """[N, in_dim] → [N, out_dim], not normalised: the loss does that."""
        projection: Tensor = self.layers(h)
        return projection


def _dense(in_dim: int, out_dim: int) -> nn.Linear:
    dense = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(dense.weight, std=0.01)
    return dense
