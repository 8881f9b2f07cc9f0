"""NT-Xent over the global batch: the entry that checks its input and picks a backend.

The formula stands in `model.ntxent.reference`; `model.ntxent.tiled` computes it without the 2N × 2N matrix.

Shapes: N images on this rank, D width.
"""

import functools
import logging
import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives
from model.ntxent.reference import nt_xent_reference
from model.ntxent.tiled import nt_xent_tiled

Backend = Literal["auto", "reference", "tiled"]

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
    temperature: float,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> NTXentOutput:
    """SimCLR's loss for the two views' projections, with the negatives of all ranks of `group`.

    All ranks must call, with equal N. The gradient is exact for data-parallel averaging: the mean over ranks
    of the local losses is the global loss, and gradients averaged over ranks are the global loss's gradient.
    That takes the same upstream gradient on every rank; the backward itself communicates nothing.

    Args:
        z1: projections of view 1 [N, D], fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64), under
            autocast too.
        z2: projections of view 2, row by row of the same images.
        temperature: τ > 0.
        normalize: divide each row by its norm first.
        group: the ranks that share the batch; default: all.
        backend: "tiled" (any device, any number of ranks; memory O(N·D) for all ranks' N) or "reference" (one
            process, the whole matrix); "auto" is "tiled".

    Raises:
        ValueError: shapes or dtypes that do not fit; τ ≤ 0; "reference" with several ranks; N that differs
            between ranks (seen on the CPU only: see `nt_xent_tiled`).
    """
    _check(z1, z2, temperature)
    ranks = collectives.world_size(group)
    if backend == "auto":
        backend = "tiled"
        _log_choice(backend, z1.device.type, ranks)
    with torch.autocast(z1.device.type, enabled=False):
        if backend == "tiled":
            output = nt_xent_tiled(z1, z2, temperature=temperature, normalize=normalize, group=group)
            return NTXentOutput(*output)
        if backend == "reference":
            if ranks > 1:
                raise ValueError(f"backend 'reference' serves one process, got world size {ranks}; use 'tiled'")
            return NTXentOutput(*nt_xent_reference(z1, z2, temperature=temperature, normalize=normalize))
    raise ValueError(f"`backend` must be 'auto', 'reference' or 'tiled', got {backend!r}")


def _check(z1: Tensor, z2: Tensor, temperature: float) -> None:
    if z1.shape != z2.shape or z1.ndim != 2 or not z1.numel():
        raise ValueError(f"z1 and z2 must be [N, D] alike with N, D ≥ 1, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        raise ValueError(f"z1 and z2 must share one floating-point dtype, got {z1.dtype} and {z2.dtype}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}; SimCLR uses 0.1 to 0.5")


@functools.cache  # once for each choice, not every step
def _log_choice(backend: str, device: str, ranks: int) -> None:
    logger.info("NT-Xent backend: %s (%s, %d ranks)", backend, device, ranks)
