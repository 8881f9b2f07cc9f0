"""Which backend computes a step of LARS: what each one asks of the parameters and of the machine."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Literal, NamedTuple, cast, get_args

import torch

from train.optim.stretches import FORMS, Backend, Form, Stretches, strides

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "reference", "fused", "triton", "apex"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


class Kind(NamedTuple):
    """What matters of a stretch."""

    device: str
    dtype: torch.dtype
    dense: bool
    """Its elements fill one stretch of memory, in whatever order."""
    form: Form

    def __str__(self) -> str:
        return f"{'dense' if self.dense else 'strided'} {str(self.dtype).removeprefix('torch.')} on {self.device}"


class Needs(NamedTuple):
    """What a backend serves."""

    module: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    package: str
    forms: tuple[Form, ...] = FORMS
    hint: str = ""
    """Where to read more, when the package is missing."""

    def unmet(self, kind: Kind) -> str | None:
        """What stands against serving `kind`, in words."""
        if kind.device != self.device or kind.dtype not in self.dtypes or not kind.dense:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"needs parameters that are dense {names} on {self.device}, got {kind}; set it to auto"
        if kind.form not in self.forms:
            return f"computes `optim.form` {' or '.join(self.forms)}, got {kind.form}; set `optim.backend` to auto"
        if importlib.util.find_spec(self.package) is None:
            return f"needs the package {self.package}, which is not installed; set it to auto{self.hint}"
        return None


NEEDS: dict[BackendName, Needs] = {
    "fused": Needs("train.optim.lars_fused", "cpu", (torch.float32,), "numba"),
    "triton": Needs("train.optim.lars_triton", "cuda", (torch.float32, torch.bfloat16, torch.float16), "triton"),
    "apex": Needs(
        "train.optim.lars_apex",
        "cuda",
        (torch.float32,),
        package="amp_C",
        forms=("classic", "larc"),
        hint=", or build NVIDIA apex from its source as docs/guides/apex.md says",
    ),
}
AUTO: tuple[BackendName, ...] = ("fused", "triton")
REFERENCE = "train.optim.lars_loop"


def check_backend(name: BackendName, form: Form, device: torch.device) -> None:
    """Refuse a backend that cannot train float32 parameters on a device, before there are any.

    Raises:
        ValueError: what it needs, and what to do.
    """
    kinds = frozenset([Kind(device.type, torch.float32, True, form)])
    if name not in ("auto", "reference") and (reason := _unmet(name, kinds)):
        raise ValueError(f"`optim.backend` {name} {reason}")


def choose_backend(name: BackendName, stretches: Stretches) -> Backend:
    """The module that computes steps over these stretches; `auto` logs its choice, once.

    Raises:
        ValueError: `name` cannot serve them.
    """
    found = set()
    for param, buffer, options in zip(stretches.params, stretches.buffers, stretches.options, strict=True):
        # The buffer is dense: a parameter with its strides is so too.
        dense = param.stride() == buffer.stride() or strides(param) == strides(buffer)
        found.add((param.device, param.dtype, dense, options.form))
    return _choose(name, frozenset(Kind(device.type, dtype, dense, form) for device, dtype, dense, form in found))


@cache
def _choose(name: BackendName, kinds: frozenset[Kind]) -> Backend:
    if name == "auto":
        name = next((name for name in AUTO if _unmet(name, kinds) is None), "reference")
        logger.info("LARS: backend %s, for parameters that are %s", name, ", ".join(sorted(map(str, kinds))))
    elif name != "reference" and (reason := _unmet(name, kinds)):
        raise ValueError(f"`optim.backend` {name} {reason}")
    return cast(Backend, importlib.import_module(REFERENCE if name == "reference" else NEEDS[name].module))


def _unmet(name: BackendName, kinds: frozenset[Kind]) -> str | None:
    return next(filter(None, (NEEDS[name].unmet(kind) for kind in sorted(kinds, key=str))), None)
