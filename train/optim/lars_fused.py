"""The CPU backend of LARS: `train.optim.lars_numba` on as many threads as torch computes with.

A stretch is computed by one thread, always in the same way, so that results do not depend on their number. Large
stretches are taken first, so that the threads end together.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.optim.lars_numba import NORMS, OPTIONS, ROW, STEP, UPDATE, kernel
from train.optim.stretches import FORMS, Options, Stretches

ELEMENTS_PER_THREAD = 2**17  # about 60 µs of work: a thread that sleeps is not woken for less
TURNS = 8  # in which each thread takes work, so that one that was held up leaves it to the others


def step(stretches: Stretches, skip: Tensor | None) -> None:
    """A whole step, where every tensor is one stretch."""
    if skip is None or not skip:
        _run(STEP, stretches, np.empty((len(stretches.params), 2)))


def squared_norms(stretches: Stretches) -> Tensor:
    """The stretches' part of ‖p‖² and of ‖d‖² [num_tensors, 2], float64."""
    norms = np.zeros((len(stretches.params), 2))
    _run(NORMS, stretches, norms)
    sums = np.zeros((stretches.num_tensors, 2))
    np.add.at(sums, stretches.tensors, norms)
    return torch.from_numpy(sums)


def update(stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
    """Change `params` and `buffers`, given the sums over all stretches and ranks."""
    if skip is None or not skip:
        _run(UPDATE, stretches, squared_norms.numpy()[stretches.tensors])


def _run(job: int, stretches: Stretches, norms: NDArray[np.float64]) -> None:
    """All stretches, on the calling thread and, where there is enough for them, on others."""
    rows, options = _rows(stretches)
    total = int(rows["size"].sum())
    num_threads = min(torch.get_num_threads(), max(1, total // ELEMENTS_PER_THREAD))
    run = kernel()
    if num_threads == 1:
        run(job, rows, options, norms)
        return

    order = np.argsort(-rows["size"], kind="stable")
    rows, ordered = rows[order], norms[order]
    turns = iter(_turns(rows["size"], total // (TURNS * num_threads)))  # one iterator: each turn is taken once

    def work() -> None:
        for turn in turns:
            run(job, rows[turn], options, ordered[turn])

    others = [_pool(num_threads - 1, os.getpid()).submit(work) for _ in range(num_threads - 1)]
    work()
    for other in others:
        other.result()
    norms[order] = ordered


def _turns(sizes: NDArray[np.intp], least: int) -> list[slice]:
    """Consecutive stretches that have at least so many elements together."""
    numbers = np.cumsum(sizes) // max(1, least)
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(sizes)]
    return [slice(first, last) for first, last in pairwise(borders)]


def _rows(stretches: Stretches) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """`ROW` of each stretch, and the `OPTIONS` that they refer to."""
    distinct: dict[Options, int] = {}
    rows = np.empty(len(stretches.params), ROW)
    rows["param"] = [param.data_ptr() for param in stretches.params]
    rows["grad"] = [grad.data_ptr() for grad in stretches.grads]
    rows["buffer"] = [buffer.data_ptr() for buffer in stretches.buffers]
    rows["size"] = [param.numel() for param in stretches.params]
    rows["options"] = [distinct.setdefault(options, len(distinct)) for options in stretches.options]
    options = np.array([(*chosen[:5], FORMS.index(chosen.form), chosen.nesterov) for chosen in distinct], OPTIONS)
    return rows, options


@cache
def _pool(num_threads: int, _process: int) -> ThreadPoolExecutor:  # a fork has none of its parent's threads
    return ThreadPoolExecutor(num_threads, thread_name_prefix="lars")
