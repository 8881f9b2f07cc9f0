"""NT-Xent's steps as torch operators, `torch.ops.twinview.ntxent_*`, which `torch.compile` takes as they are.

Compiled kernels cannot be traced; as operators that say what their results look like, they need not be. Eager calls go
without them: their dispatch takes about 60 µs each on a CPU, as long as the work on a small batch.

A backend's name is an argument of each, so that what is compiled runs what was chosen.

Shapes: N images, R = 2N rows of this rank, C columns, D width; rows are in the form of their backend.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from model.ntxent import float_rows
from model.ntxent.float_rows import Kept

MODULES = {"tiled": "tiled", "fused": "fused", "triton": "triton_launch"}
"""By backend; imported when one is used, since not every machine has what it needs."""


def module(backend: str) -> ModuleType:
    """The module of a backend."""
    return importlib.import_module(f"model.ntxent.{MODULES[backend]}")


def steps(backend: str) -> tuple[Any, Any]:
    """What `model.ntxent.autograd.Settings` calls `backend` and `rows`: operators if this is being compiled."""
    if torch.compiler.is_compiling():
        operators = Operators(backend)
        return operators, operators
    walk = module(backend)
    return walk, walk if backend == "triton" else float_rows


@torch.library.custom_op(
    "twinview::ntxent_scan",
    mutates_args=(),
    schema="(Tensor rows, Tensor columns, SymInt? first, str backend) -> (Tensor, Tensor)",
)
def scan(rows: Tensor, columns: Tensor, first: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """A backend's `scan`."""
    lse, hardest = module(backend).scan(rows, columns, first)
    return lse, hardest


@scan.register_fake
def _(rows: Tensor, columns: Tensor, first: int | None, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if backend == "triton" else rows.dtype
    return rows.new_empty(len(rows), dtype=dtype), rows.new_empty(len(rows), dtype=dtype)


@torch.library.custom_op(
    "twinview::ntxent_gradient",
    mutates_args=(),
    schema="(Tensor rows, Tensor columns, Tensor row_lse, Tensor column_lse, SymInt? first, str backend) -> Tensor",
)
def gradient(
    rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None, backend: str
) -> Tensor:
    """A backend's `gradient`."""
    grad: Tensor = module(backend).gradient(rows, columns, row_lse, column_lse, first)
    return grad


@gradient.register_fake
def _(rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None, backend: str) -> Tensor:
    if backend == "triton":
        return rows.new_empty(module(backend).gradient_shape(rows, columns), dtype=torch.float32)
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "twinview::ntxent_to_rows",
    mutates_args=(),
    schema="(Tensor z1, Tensor z2, float temperature, Tensor? learned_temperature) -> (Tensor, Tensor)",
)
def to_rows(z1: Tensor, z2: Tensor, temperature: float, learned_temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """`to_rows` of Triton's rows: the rows, and s of their positives. A learned τ takes the place of the number."""
    tau = temperature if learned_temperature is None else learned_temperature
    rows, positive, _ = module("triton").to_rows(z1, z2, tau)
    return rows, positive


@to_rows.register_fake
def _(z1: Tensor, z2: Tensor, temperature: float, learned_temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = module("triton").rows_shape(z1)
    return z1.new_empty(shape, dtype=torch.float16), z1.new_empty(shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "twinview::ntxent_to_input",
    mutates_args=(),
    schema=(
        "(Tensor sums, Tensor z1, Tensor z2, Tensor margin, Tensor upstream, float temperature, "
        "Tensor? learned_temperature) -> (Tensor, Tensor)"
    ),
)
def to_input(
    sums: Tensor,
    z1: Tensor,
    z2: Tensor,
    margin: Tensor,
    upstream: Tensor,
    temperature: float,
    learned_temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`to_input` of Triton's rows; without a learned τ its gradient is 0."""
    tau = temperature if learned_temperature is None else learned_temperature
    grad, temperature_grad = module("triton").to_input(sums, sums, (z1, z2), margin, upstream, tau)
    return grad, margin.new_zeros(()) if temperature_grad is None else temperature_grad


@to_input.register_fake
def _(
    sums: Tensor,
    z1: Tensor,
    z2: Tensor,
    margin: Tensor,
    upstream: Tensor,
    temperature: float,
    learned_temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return z1.new_empty((2 * z1.shape[0], z1.shape[1])), margin.new_empty(())


class Operators:
    """A backend by its operators, for `model.ntxent.autograd.Settings`; also the rows of `triton`."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def scan(self, rows: Tensor, columns: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
        """See `model.ntxent.tiled.scan`."""
        lse, hardest = scan(rows, columns, first, self._backend)
        return lse, hardest

    def gradient(self, rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None) -> Tensor:
        """See `model.ntxent.tiled.gradient`."""
        grad: Tensor = gradient(rows, columns, row_lse, column_lse, first, self._backend)
        return grad

    def to_rows(
        self, z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """See `model.ntxent.float_rows.to_rows`."""
        if self._backend != "triton":
            return float_rows.to_rows(z1, z2, temperature, normalize)
        rows, positive = to_rows(z1, z2, *_separated(temperature))
        return rows, positive, (z1, z2)

    def to_input(
        self, grad: Tensor, u: Tensor, kept: Kept, margin: Tensor, upstream: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `model.ntxent.float_rows.to_input`."""
        if self._backend != "triton":
            return float_rows.to_input(grad, u, kept, margin, upstream, temperature)
        z_grad, temperature_grad = to_input(grad, *kept, margin, upstream, *_separated(temperature))
        return z_grad, temperature_grad if isinstance(temperature, Tensor) else None


def _separated(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
