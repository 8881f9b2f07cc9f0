"""LARS on a GPU in two launches over a table of addresses, in Triton: a backend as `train.optim.stretches` describes.

The first launch sums squares, chunk by chunk; in the second, each chunk's program adds up the sums of its tensor and
updates the chunk in place. Nothing is compiled anew when a rate changes, and nothing waits for the device.

The table is made anew for each step, since rates change in each and gradients may move: a row for each stretch and a
number for each chunk. It is sent through pinned memory that torch's allocator lends, and keeps while a copy reads it.
A CUDA graph records the addresses and options of its step; a rate that is a tensor is read anew in each replay.

Legend: S stretches, C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from train.optim import lars_triton_kernels as kernels
from train.optim.lars_triton_kernels import FORMS, ROW
from train.optim.stretches import Stretches

# Elements of a chunk: few enough that the last programs end together, and so many that their tensor's partial sums are
# soon read: each program reads 8 bytes for every chunk of its tensor, and moves 20 · CHUNK.
CHUNK = 8192
BLOCK = 2048  # elements at a time: 8 a thread
NORMS = 512  # partial sums at a time
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_recorded: list[Tensor] = []
"""Pinned memory from which CUDA graphs copy their tables in every replay: kept for as long as the process lives."""

Kind = tuple[torch.dtype, torch.dtype]
"""Of parameters and their momentum, and of gradients."""


class Launch(NamedTuple):
    """One start of a kernel."""

    kernel: Any
    num_programs: int
    arguments: tuple[Tensor, ...]
    constants: dict[str, Any]
    options: dict[str, Any] = OPTIONS

    def run(self) -> None:
        """On the current device and stream."""
        self.kernel[(self.num_programs,)](*self.arguments, **self.constants, **self.options)


class Table(NamedTuple):
    """What the kernels read, on the device."""

    rows: Tensor
    """ROW [S], as bytes."""
    ends: Tensor
    """int32 [num_tensors + 1]: a tensor's chunks begin at its own entry, and end at the next one's."""
    chunks: list[tuple[Tensor, Kind]]
    """For each combination of types the stretch and the number of its chunks, int32 [., 2]."""
    num_chunks: int
    moving: bool
    """Whether any stretch is of the form `non_classic`."""


def step(stretches: Stretches, skip: Tensor | None) -> None:
    """A whole step, where every tensor is one stretch."""
    _run(stretches, step_launches(stretches, skip))


def squared_norms(stretches: Stretches) -> Tensor:
    """The stretches' part of ‖p‖² and of ‖d‖², float32 [num_tensors, 2]; at least one stretch."""
    launches, norms = norms_launches(stretches)
    _run(stretches, launches)
    return norms


def update(stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> None:
    """Change `params` and `buffers`, given the sums over all stretches and ranks."""
    _run(stretches, update_launches(stretches, squared_norms, skip))


def step_launches(stretches: Stretches, skip: Tensor | None) -> list[Launch]:
    """What a whole step runs, in order. It has the addresses of the stretches, which must live until it has run."""
    table = send_table(stretches, whole=False)
    partials = table.rows.new_empty((table.num_chunks, 2), dtype=torch.float32)
    return [*_partial_norms(table, partials), *_update(table, partials, skip)]


def norms_launches(stretches: Stretches) -> tuple[list[Launch], Tensor]:
    """What runs to fill the squared norms, which are returned too."""
    table = send_table(stretches, whole=False)
    partials = table.rows.new_empty((table.num_chunks, 2), dtype=torch.float32)
    norms = partials.new_empty(stretches.num_tensors, 2)
    add_up = Launch(kernels.sum_norms_kernel, len(norms), (partials, table.ends, norms), {"BLOCK": NORMS})
    return [*_partial_norms(table, partials), add_up], norms


def update_launches(stretches: Stretches, squared_norms: Tensor, skip: Tensor | None) -> list[Launch]:
    """What an update runs."""
    return list(_update(send_table(stretches, whole=True), squared_norms, skip))


def send_table(stretches: Stretches, *, whole: bool) -> Table:
    """Make the table, and send it on the current stream.

    Args:
        stretches: at least one.
        whole: the update reads the squared norms of whole tensors, not of chunks.

    Raises:
        ValueError: a type that the kernels do not know.
    """
    rows = _rows(stretches)
    num_chunks = -(-rows["numel"] // CHUNK)
    borders = np.concatenate([[0], np.cumsum(num_chunks)])
    tensors = np.array(stretches.tensors)
    ends = borders[np.searchsorted(tensors, np.arange(stretches.num_tensors + 1))]
    rows["first_chunk"] = borders[:-1]
    rows["first_norm"] = tensors if whole else ends[tensors]
    rows["num_norms"] = 1 if whole else np.diff(ends)[tensors]

    kinds = [(param.dtype, grad.dtype) for param, grad in zip(stretches.params, stretches.grads, strict=True)]
    distinct = list(dict.fromkeys(kinds))
    _check_types(distinct)
    kind = np.array([distinct.index(kind) for kind in kinds])
    stretch = np.repeat(np.arange(len(rows), dtype=np.int32), num_chunks)
    chunks = np.stack([stretch, np.arange(len(stretch), dtype=np.int32)], axis=1)
    parts = [chunks[kind[stretch] == i] for i in range(len(distinct))]
    sent_rows, sent_ends, *sent_parts = _send([rows, ends.astype(np.int32), *parts], stretches.params[0].device)
    return Table(
        rows=sent_rows,
        ends=sent_ends.view(torch.int32),
        chunks=[(part.view(torch.int32).view(-1, 2), kind) for part, kind in zip(sent_parts, distinct, strict=True)],
        num_chunks=len(stretch),
        moving=bool((rows["form"] == FORMS.index("non_classic")).any()),
    )


def _rows(stretches: Stretches) -> NDArray[Any]:
    """Addresses and options."""
    rows = np.zeros(len(stretches.params), ROW)
    rows["param"] = [param.data_ptr() for param in stretches.params]
    rows["grad"] = [grad.data_ptr() for grad in stretches.grads]
    rows["buffer"] = [buffer.data_ptr() for buffer in stretches.buffers]
    rows["numel"] = [param.numel() for param in stretches.params]
    distinct = {id(options): options for options in stretches.options}  # one object for all parameters of a group
    order = {key: i for i, key in enumerate(distinct)}
    place = [order[id(options)] for options in stretches.options]
    rows["form"] = np.array([FORMS.index(options.form) for options in distinct.values()])[place]
    for name in ("adapt", "nesterov", "momentum", "weight_decay", "trust_coefficient"):
        rows[name] = np.array([getattr(options, name) for options in distinct.values()])[place]
    rates = [options.lr for options in distinct.values()]
    rows["lr"] = np.array([0.0 if isinstance(lr, Tensor) else lr for lr in rates])[place]
    rows["lr_address"] = np.array([_address(lr, stretches) if isinstance(lr, Tensor) else 0 for lr in rates])[place]
    return rows


def _address(lr: Tensor, stretches: Stretches) -> int:
    device = stretches.params[0].device
    if lr.numel() != 1 or lr.dtype != torch.float32 or lr.device != device:
        raise ValueError(
            f"`lr` must be a number or one float32 on {device}, got {lr.numel()} {lr.dtype} on {lr.device}"
        )
    return lr.data_ptr()


def _check_types(kinds: list[Kind]) -> None:
    for name, dtypes in zip(("parameters", "gradients"), zip(*kinds, strict=True), strict=True):
        unknown = next((dtype for dtype in dtypes if dtype not in TYPES), None)
        if unknown is not None:
            raise ValueError(
                f"`optim.backend` triton needs {name} in float32, bfloat16 or float16, got {unknown}; "
                "set it to reference"
            )


def _send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy arrays to the device in one piece; their bytes, each array's from a multiple of 16 on."""
    begins = [0, *accumulate(-(-array.nbytes // 16) * 16 for array in arrays)]
    packed = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _recorded.append(packed)
    for array, begin in zip(arrays, begins[:-1], strict=True):
        packed.numpy()[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = packed.to(device, non_blocking=True)
    return [sent[begin : begin + array.nbytes] for array, begin in zip(arrays, begins[:-1], strict=True)]


def _partial_norms(table: Table, partials: Tensor) -> Iterator[Launch]:
    return _over_chunks(kernels.partial_norms_kernel, table, (partials,), {"MOVING": table.moving})


def _update(table: Table, norms: Tensor, skip: Tensor | None) -> Iterator[Launch]:
    constants: dict[str, Any] = {"NORMS": NORMS}
    if skip is None:
        return _over_chunks(kernels.update_kernel, table, (norms,), constants | {"skip": None})
    return _over_chunks(kernels.update_kernel, table, (norms, skip.view(torch.uint8)), constants)


def _over_chunks(
    kernel: Any, table: Table, arguments: tuple[Tensor, ...], constants: dict[str, Any]
) -> Iterator[Launch]:
    """A program for each chunk; one launch for each combination of types."""
    for chunks, (params, grads) in table.chunks:
        if len(chunks) > 0:
            shape = {"PARAMS": TYPES[params], "GRADS": TYPES[grads], "CHUNK": CHUNK, "BLOCK": BLOCK}
            yield Launch(kernel, len(chunks), (table.rows, chunks, *arguments), shape | constants)


def _run(stretches: Stretches, launches: list[Launch]) -> None:
    with torch.cuda.device(stretches.params[0].get_device()):  # on the CPU, as in the interpreter, this does nothing
        for launch in launches:
            launch.run()
