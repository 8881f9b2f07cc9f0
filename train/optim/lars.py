"""LARS (layer-wise adaptive rate scaling), SimCLR's optimizer, in three forms and on several backends.

Sources: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017; google-research/simclr,
lars_optimizer.py. The formulas are in `train.optim.lars_reference`, what a backend is in `train.optim.stretches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from model.collectives import all_reduce_sum_
from train.optim.lars_backends import BACKENDS, BackendName, choose_backend
from train.optim.stretches import FORMS, Form, Options, Piece, Stretches, norm_dtype, strides


@dataclass(frozen=True, kw_only=True)
class LARSConfig:
    """Hyperparameters of LARS; the defaults are SimCLR's (v1, section 2.3; momentum and η from its code)."""

    name: Literal["lars", "sgd"] = "lars"
    """`sgd`: momentum SGD, the same steps with every trust ratio 1 (and so without a `trust_coefficient`)."""
    base_lr: float = 0.3
    """Learning rate before scaling by the global batch size; SimCLR: 0.3 (`linear`) or 0.075 (`sqrt`)."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """`linear`: peak rate = base_lr · batch / 256; `sqrt`: peak rate = base_lr · √batch."""
    momentum: float = 0.9
    """Share of the last update that is kept, in [0, 1)."""
    nesterov: bool = False
    """Nesterov's momentum: move by what the momentum will be after the next step of the same gradient."""
    weight_decay: float = 1e-6
    """L2 penalty, added to the gradient of every parameter but biases and norms."""
    trust_coefficient: float = 1e-3
    """η: the length of one update of rate 1, as a share of the parameter's norm."""
    form: Form = "classic"
    """`classic`: google's, with which SimCLR was published: the rate inside the momentum, the ratio to the norm of the
    decayed gradient. `non_classic`: google's other one: the rate outside, the ratio to the norm of the whole update.
    `larc`: that of lightly, solo-learn and NVIDIA apex: the rate outside, the ratio to the gradient's norm plus the
    decay's. Rates tuned for one form do not serve another."""
    backend: BackendName = "auto"
    """What computes the step. `fused`: one pass in compiled code, for float32 on the CPU; `triton`: the same for GPUs;
    `apex`: NVIDIA apex's kernels, where they are installed; `reference`: torch, anywhere. `auto` takes the fastest of
    fused, triton and reference that serves the parameters."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("name", ("lars", "sgd")),
            ("lr_scaling", ("linear", "sqrt")),
            ("form", FORMS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`optim.{name}` must be one of {', '.join(choices)}, got {getattr(self, name)}")
        for name in ("base_lr", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`optim.{name}` must be finite and not negative, got {getattr(self, name)}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`optim.momentum` must be in [0, 1), got {self.momentum}; SimCLR's is 0.9")
        if self.nesterov and self.momentum == 0:
            raise ValueError("`optim.nesterov` must be false where `optim.momentum` is 0, got true")
        if not 0.0 < self.trust_coefficient < math.inf:
            raise ValueError(
                f"`optim.trust_coefficient` must be positive, got {self.trust_coefficient}; SimCLR's is 0.001"
            )


def peak_lr(config: LARSConfig, global_batch_size: int) -> float:
    """The rate at the end of the warm-up: base_lr · B / 256, or base_lr · √B (SimCLR v1, appendix B.1)."""
    if config.lr_scaling == "linear":
        return config.base_lr * global_batch_size / 256
    return config.base_lr * math.sqrt(global_batch_size)


class LARS(Optimizer):
    """LARS over groups from `train.optim.param_groups`.

    A group with `adapt=False` takes plain momentum steps (trust ratio 1). State: one buffer per parameter,
    `momentum`, made at the first step in which the parameter has a gradient. A step never waits for a device. The
    parameters of an optimizer live on one device.

    Args:
        params: parameters, or groups that may carry `adapt` and, with values of their own, what is named below except
            `backend`.
        lr: learning rate; a schedule sets `group["lr"]` before each step. For steps that a CUDA graph replays, a
            float32 scalar on the parameters' device (backends triton and reference; others read it on the host).
        momentum: in [0, 1).
        weight_decay: L2 penalty added to the gradient.
        trust_coefficient: η of the trust ratio.
        form: which formula.
        nesterov: Nesterov's momentum.
        backend: what computes it; chosen at the first step, when the parameters are where they will be trained.
    """

    _partition: _Partition | None = None
    skip: Tensor | None = None
    """Bool scalar on the parameters' device, to be set by whoever calls `step`: where it is true, nothing changes."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float | Tensor = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        form: Form = "classic",
        nesterov: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
            "form": form,
            "nesterov": nesterov,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def partition(
        self, pieces: dict[Tensor, list[Piece]], num_tensors: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """Take parameters as flat partitions of whole tensors from now on, as ZeRO leaves them to an optimizer.

        The norms are then those of the whole tensors: partial sums are added up over the ranks in each step, which all
        ranks of `group` must take. What no piece covers, padding, stays as it is. A tensor's pieces, on whatever rank,
        must be in groups of the same hyperparameters.

        Args:
            pieces: for each parameter [n] of this optimizer the pieces in it, which must not overlap; none for padding.
            num_tensors: how many whole tensors there are on all ranks, whose numbers count from 0.
            group: the ranks that share the tensors out; default: all.

        Raises:
            ValueError: a parameter without pieces or that is not flat, or a piece that is not where it can be.
        """
        ours = {id(param) for param_group in self.param_groups for param in param_group["params"]}
        known = ours & set(map(id, pieces))
        if len(known) < max(len(ours), len(pieces)):
            strangers = f", and {len(pieces) - len(known)} other" if len(pieces) > len(known) else ""
            raise ValueError(
                "`pieces` must have the parameters of this optimizer as its keys, "
                f"got {len(known)} of {len(ours)}{strangers}"
            )
        for param, inside in pieces.items():
            if param.ndim != 1 or not param.is_contiguous():
                raise ValueError(f"a partition must be flat and contiguous, got shape {list(param.shape)}")
            for piece in inside:
                if piece.start < 0 or piece.size < 0 or piece.start + piece.size > param.numel():
                    raise ValueError(f"{piece} must lie within its partition of {param.numel()} elements")
                if not 0 <= piece.tensor < num_tensors:
                    raise ValueError(f"{piece} must have a tensor number below `num_tensors`, {num_tensors}")
        self._partition = _Partition(pieces, num_tensors, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients stay as they are.

        Raises:
            ValueError: `backend` names one that cannot serve these parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._partition is None:
            stretches = self._whole_parameters()
            if stretches.params:
                choose_backend(self.defaults["backend"], stretches).step(stretches, self.skip)
        else:
            self._step_partition(self._partition)
        return loss

    def _step_partition(self, partition: _Partition) -> None:
        stretches = partition.stretches(self._whole_parameters())
        backend = choose_backend(self.defaults["backend"], stretches) if stretches.params else None
        if backend is not None:
            norms = backend.squared_norms(stretches)
        else:
            some = next(iter(partition.pieces))
            norms = torch.zeros(partition.num_tensors, 2, dtype=norm_dtype(some), device=some.device)
        all_reduce_sum_(norms, partition.group)
        if backend is not None:
            backend.update(stretches, norms, self.skip)

    def _whole_parameters(self) -> Stretches:
        """Every parameter that has a gradient as one stretch."""
        whole = Stretches([], [], [], [], [], num_tensors=0)
        for group in self.param_groups:
            options = Options(
                lr=lr if isinstance(lr := group["lr"], Tensor) else float(lr),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                trust_coefficient=group["trust_coefficient"],
                adapt=group["adapt"],
                form=group["form"],
                nesterov=group["nesterov"],
            )
            for param in group["params"]:
                if param.grad is not None:
                    whole.params.append(param)
                    whole.grads.append(_laid_out_as(param, param.grad))
                    whole.buffers.append(self._momentum(param))
                    whole.options.append(options)
        count = len(whole.params)
        whole.tensors.extend(range(count))
        return whole._replace(num_tensors=count)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum"]
        laid_out = _laid_out_as(param, buffer)
        if laid_out is not buffer:  # the parameter took another memory format after the state was loaded
            state["momentum"] = laid_out
        return laid_out


class _Partition:
    """The pieces of flat parameters, and the stretches that they are in a step."""

    def __init__(self, pieces: dict[Tensor, list[Piece]], num_tensors: int, group: dist.ProcessGroup | None) -> None:
        self.pieces, self.num_tensors, self.group = pieces, num_tensors, group
        everywhere = [(piece, param) for param in pieces for piece in pieces[param] if piece.size > 0]
        self._order = sorted(everywhere, key=lambda item: item[0].tensor)

    def stretches(self, flat: Stretches) -> Stretches:
        """The pieces with a gradient, as views."""
        position = {id(param): i for i, param in enumerate(flat.params)}
        cut = Stretches([], [], [], [], [], num_tensors=self.num_tensors)
        for piece, param in self._order:
            i = position.get(id(param))
            if i is not None:
                for whole, parts in zip(flat[:3], cut[:3], strict=True):
                    parts.append(whole[i].narrow(0, piece.start, piece.size))
                cut.options.append(flat.options[i])
                cut.tensors.append(piece.tensor)
        return cut


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself where it has the dtype and the memory layout of `param`, else a copy that has them."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"LARS needs dense gradients, got {tensor.layout}; build the layer with `sparse=False`")
    if tensor.dtype == param.dtype and (tensor.stride() == param.stride() or strides(tensor) == strides(param)):
        return tensor
    return torch.empty_like(param).copy_(tensor)
