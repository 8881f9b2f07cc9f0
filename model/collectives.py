"""The few collectives that the models need; each is the identity when no process group is running.

None of them carries a gradient: the autograd functions that use them (`model.norm`, `model.ntxent.tiled`)
know their own gradients across ranks. Every rank of the group must make the same calls in the same order.

Shapes: R rows on this rank, W ranks, D width.
"""

import torch
import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in `group` (default: all); 1 when torch.distributed is not initialised."""
    return dist.get_world_size(group) if _running() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in `group` (default: all); 0 when torch.distributed is not initialised."""
    return dist.get_rank(group) if _running() else 0


def all_gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """`[R, …]` on every rank → `[W·R, …]` in rank order, the same on all; `x` itself for one rank.

    R must be equal on all ranks. Where it is not, gloo aborts the process and NCCL hangs: see
    `check_equal_rows`.
    """
    ranks = world_size(group)
    if ranks == 1:
        return x
    gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def all_reduce_sum_(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum of `x` over the ranks, in place; returns `x`."""
    if world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def check_equal_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Refuse, on every rank, row counts that differ between the ranks.

    One all-gather of an integer, and a wait for its answer. The wait is free for CPU tensors only: a training
    step on GPUs has to be sure of its rows by other means.

    Raises:
        ValueError: the ranks hold different numbers of rows; names them in rank order.
    """
    if world_size(group) == 1:
        return
    rows = all_gather_rows(torch.tensor([x.shape[0]], device=x.device), group).tolist()
    if len(set(rows)) > 1:
        raise ValueError(
            f"every rank must hold the same number of rows, got {rows} in rank order; "
            "choose a global batch size that the world size divides and drop the last partial batch"
        )


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
