"""NT-Xent over the global batch: the entry that checks its input and picks a backend.

The formula stands in `model.ntxent.reference`; `model.ntxent.autograd` computes it over all ranks without the
2N × 2N matrix.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives
from model.exchange import Exchange
from model.inputs import check_projections, check_temperature
from model.ntxent import tiled
from model.ntxent.autograd import NTXentFunction, Settings
from model.ntxent.reference import nt_xent_reference

Backend = Literal["auto", "reference", "tiled"]
BACKENDS = {"tiled": tiled}

logger = logging.getLogger(__name__)


class NTXentOutput(NamedTuple):
    """Means over this rank's 2N rows: their mean over the ranks is the global figure."""

    loss: Tensor
    """Scalar, fp32 (fp64 for fp64 input)."""
    contrastive_accuracy: Tensor
    """Scalar, detached: the share of rows whose positive is more similar than every negative of all ranks."""


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "all_gather",
    backend: Backend = "auto",
) -> NTXentOutput:
    """SimCLR's loss for the two views' projections, with the negatives of all ranks of `group`.

    All ranks must call, with equal N. The gradient is exact for data-parallel averaging: the mean over ranks
    of the local losses is the global loss, and gradients averaged over ranks are the global loss's gradient.
    That takes the same upstream gradient on every rank.

    Args:
        z1: projections of view 1 [N, D], fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64), under
            autocast too.
        z2: projections of view 2, row by row of the same images.
        temperature: τ > 0; a scalar tensor receives a gradient, and is not looked at (that would stall a GPU).
        normalize: divide each row by its norm first.
        group: the ranks that share the batch; default: all.
        exchange: "all_gather" holds all ranks' rows, and its backward communicates nothing; "ring" passes them
            from rank to rank, forward and backward, and holds two ranks' rows at a time.
        backend: "tiled" (any device, any number of ranks; memory O(N·D) for all ranks' N) or "reference" (one
            process, the whole matrix); "auto" is "tiled".

    Raises:
        ValueError: shapes or dtypes that do not fit; τ ≤ 0; "reference" with several ranks; N that differs
            between ranks (seen on the CPU only: see `model.inputs.check_projections`).
    """
    check_projections(z1, z2, group)
    check_temperature(temperature)
    ranks = collectives.world_size(group)
    if backend == "auto":
        backend = "tiled"
        _log_choice(backend, z1.device.type, ranks)
    with torch.autocast(z1.device.type, enabled=False):
        if backend == "reference":
            if ranks > 1:
                raise ValueError(f"backend 'reference' serves one process, got world size {ranks}; use 'tiled'")
            return NTXentOutput(*nt_xent_reference(z1, z2, temperature=temperature, normalize=normalize))
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be 'auto', 'reference' or one of {sorted(BACKENDS)}, got {backend!r}")
        settings = Settings(normalize, group, exchange, BACKENDS[backend])
        return NTXentOutput(*NTXentFunction.apply(z1, z2, temperature, settings))


@functools.cache  # once for each choice, not every step
def _log_choice(backend: str, device: str, ranks: int) -> None:
    logger.info("NT-Xent backend: %s (%s, %d ranks)", backend, device, ranks)
