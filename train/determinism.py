"""Whether a GPU may choose its algorithms by speed, or must give the same bits in every run.

On the CPU two runs of one configuration and number of ranks are bit-equal anyway. On GPUs, `make_deterministic` takes
what can differ out of the way:

- torch and cuDNN take algorithms that add in a fixed order; an operation that has none raises, see `explain`;
- cuBLAS shares no workspace between streams (NVIDIA's cuBLAS documentation, "Results Reproducibility");
- NCCL adds on the GPUs, in an order that its topology fixes, not in the switch (NVLS, and NVLSTree, its form
  for several machines), as in NVIDIA's Megatron-LM.

Our own kernels, Triton's and Numba's, use no atomic additions: every sum is taken by one program or thread in one
order, or in parts that are added up in one. Memory that is allocated and not yet written is not filled with NaN, as
torch would by default in this mode, since that costs a pass over each allocation, and nothing here reads it.

The same bits need the same GPUs, number of ranks and versions of libraries.
"""

from __future__ import annotations

import os
import re

import torch

from train.cli import RunFailed

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CHOICES = (":4096:8", ":16:8")  # those that NVIDIA documents as reproducible; the first is the faster
NCCL_VARIABLE = "NCCL_ALGO"


def make_deterministic() -> None:
    """Have everything on this process's devices computed in a fixed order. Before any CUDA context or NCCL group.

    Raises:
        ValueError: the environment asks cuBLAS for a workspace that makes it irreproducible.
    """
    if os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_CHOICES[0]) not in CUBLAS_CHOICES:
        raise ValueError(
            f"`train.deterministic` needs {CUBLAS_VARIABLE} to be {' or '.join(CUBLAS_CHOICES)}, "
            f"got {os.environ[CUBLAS_VARIABLE]}; unset it"
        )
    os.environ.setdefault(NCCL_VARIABLE, "^NVLS,NVLSTree")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def allow_fastest() -> None:
    """Let cuDNN try out its algorithms for each new shape of a convolution, and keep the fastest."""
    torch.backends.cudnn.benchmark = True


def explain(error: BaseException) -> RunFailed | None:
    """The line for an operation that has no deterministic form; None if the error is another."""
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    if not (isinstance(error, RuntimeError) and found):
        return None
    return RunFailed(
        f"torch has no deterministic form of {found[1]} on this device, which this run needs; "
        "set `train.deterministic` to false, or choose options that do without it",
        alike=True,
    )
