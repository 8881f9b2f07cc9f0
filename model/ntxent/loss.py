"""NT-Xent over the global batch: the entry that checks its input and picks a backend.

The formula stands in `model.ntxent.reference`; `model.ntxent.autograd` computes it over all ranks without the
2N × 2N matrix.

Shapes: N images on this rank, D width.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives
from model.exchange import Exchange, check_exchange
from model.inputs import check_projections, check_temperature
from model.ntxent import ops
from model.ntxent.autograd import NTXentFunction, Settings
from model.ntxent.reference import nt_xent_reference

Backend = Literal["auto", "reference", "tiled", "fused", "triton"]
BACKENDS: tuple[Backend, ...] = ("fused", "triton", "tiled")  # auto's preference
TRITON_CAPABILITY = (8, 0)  # the oldest GPUs that the kernels are compiled for in tests

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
        backend: "fused" (the CPU, computing in fp32), "triton" (CUDA, with normalisation: similarities of fp16 and
            bf16 inputs in fp16, of fp32 inputs to 22 bits, sums in fp32), "tiled" (any device and dtype), all for any
            number of ranks with memory O(N·D) for all ranks' N; or "reference" (one process, the whole matrix);
            "auto" is the first of these that serves.

    Raises:
        ValueError: shapes or dtypes that do not fit; τ ≤ 0; "reference" with several ranks; a backend that
            does not serve such input or runs not here; N that differs between ranks (seen on the CPU only: see
            `model.inputs.check_projections`).
    """
    check_projections(z1, z2, group)
    temperature = check_temperature(temperature)
    check_exchange(exchange)
    ranks = collectives.world_size(group)
    if backend == "auto":
        backend = next(name for name in BACKENDS if _unmet(name, z1, normalize) is None)
        if not torch.compiler.is_compiling():
            _log_choice(backend, z1.device.type, ranks)
    with torch.autocast(z1.device.type, enabled=False):
        if backend == "reference":
            if ranks > 1:
                raise ValueError(f"backend 'reference' serves one process, got world size {ranks}; use 'tiled'")
            return NTXentOutput(*nt_xent_reference(z1, z2, temperature=temperature, normalize=normalize))
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be 'auto', 'reference' or one of {sorted(BACKENDS)}, got {backend!r}")
        if unmet := _unmet(backend, z1, normalize):
            raise ValueError(f"backend {backend!r} {unmet}; use 'tiled'")
        settings = Settings(normalize, group, exchange, *ops.steps(backend))
        return NTXentOutput(*NTXentFunction.apply(z1, z2, temperature, settings))


def _unmet(backend: Backend, z: Tensor, normalize: bool) -> str | None:
    """What a backend asks for and does not get, None if it serves."""
    device, found = z.device.type, f"{z.dtype} on {z.device.type}"
    if backend == "fused" and (device != "cpu" or z.dtype == torch.float64):
        return f"computes in fp32 on the CPU, got {found}"
    if backend == "triton":
        if device != "cuda" or z.dtype == torch.float64:
            return f"computes in fp16 or fp32 on a CUDA device, got {found}"
        if not normalize:
            return "takes normalised rows, since others may not fit fp16, got `normalize` False"
        if not torch.compiler.is_compiling():  # which has Triton's help itself on a GPU
            return _missing_for_triton(z.device)
    return None


def _missing_for_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < TRITON_CAPABILITY:
        return f"needs compute capability {TRITON_CAPABILITY[0]}.{TRITON_CAPABILITY[1]}, got {found[0]}.{found[1]}"
    return None


@functools.cache  # once for each choice, not every step
def _log_choice(backend: str, device: str, ranks: int) -> None:
    logger.info("NT-Xent backend: %s (%s, %d ranks)", backend, device, ranks)
