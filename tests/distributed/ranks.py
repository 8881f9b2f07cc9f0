"""Real gloo ranks for tests: `run_ranks(fn, world_size, *args)` calls `fn(rank, *args)` in so many processes.

Starting a process imports torch, which takes seconds: let one call hold several checks. `fn` must be
importable (a function of a test module, no lambda); its arguments and its result must pickle.
"""

import os
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE_S = 800  # the time limit of a test comes first, and shows where it stood
ENDED_BY_US = (-signal.SIGTERM, -signal.SIGKILL)


def run_ranks(fn, world_size, *args, timeout_s=PATIENCE_S):
    """Run `fn(rank, *args)` in `world_size` processes of one gloo group; the results stand in rank order.

    Raises:
        RuntimeError: a rank failed (its number and its traceback in the text), or time ran out.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = mp.spawn(_rank_main, (world_size, (folder, timeout_s), fn, args), world_size, join=False)
        try:
            _join(context, timeout_s)
        except mp.ProcessExitedException as error:
            _raise_crash(folder, context.processes)
            _raise_first_failure(folder, world_size)
            raise RuntimeError(f"rank {error.error_index} of {world_size}: {error}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _join(context, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=0.2):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(context.processes)} ranks did not end within {timeout_s} s")


def _raise_crash(folder, processes):
    """A rank that died without a word is the cause, even if another one that missed it was noticed first."""
    for rank, process in enumerate(processes):
        if process.exitcode not in {None, 0, *ENDED_BY_US} and not _failure(folder, rank).exists():
            raise RuntimeError(f"rank {rank} of {len(processes)}: terminated with exit code {process.exitcode}")


def _result(folder, rank):
    return Path(folder, f"result-{rank}.pt")


def _failure(folder, rank):
    return Path(folder, f"failure-{rank}.txt")


def _raise_first_failure(folder, world_size):
    """The failure written first is the cause: the other ranks then fail for want of a partner."""
    failed = [rank for rank in range(world_size) if _failure(folder, rank).exists()]
    if failed:
        rank = min(failed, key=lambda rank: _failure(folder, rank).stat().st_mtime_ns)
        raise RuntimeError(f"rank {rank} of {world_size} failed:\n{_failure(folder, rank).read_text()}")


def _rank_main(rank, world_size, limits, fn, args):
    folder, timeout_s = limits
    # Else gloo looks for the host's own name, which may not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        torch.save(fn(rank, *args), _result(folder, rank))
        dist.barrier()  # no rank leaves while another still talks to it
    except BaseException:
        _failure(folder, rank).write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()
