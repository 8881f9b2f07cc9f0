"""Which parameters are decayed and adapted, and the optimizer's state under the parameters' names.

SimCLR excludes biases and batch-norm parameters from both weight decay and layer adaptation (by name, in
google-research/simclr, model.py). Here the rule is structural: a parameter of a norm layer, or one of at most
one dimension. Names come from `module.named_parameters()`, so that a checkpoint finds its parameter whatever
the order of the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(module: nn.Module, weight_decay: float, *, not_adapted: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that are decayed and adapted, decayed alone, and neither.

    Args:
        module: whose parameters.
        weight_decay: of those that are decayed.
        not_adapted: beginnings of the names of those that are not adapted; "" is that of every name.

    Returns:
        Up to three groups (an empty one is left out) with the keys `params`, `param_names` (PyTorch's own key,
        in the order of `params`), `weight_decay` and `adapt`.
    """
    excluded = {
        id(param)
        for layer in module.modules()
        if isinstance(layer, NORM_LAYERS)
        for param in layer.parameters(recurse=False)
    }
    adapted: dict[str, Tensor] = {}
    decayed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        if param.ndim <= 1 or id(param) in excluded:
            plain[name] = param
        else:
            (decayed if name.startswith(not_adapted) else adapted)[name] = param
    groups = [
        _group(adapted, weight_decay, adapt=True),
        _group(decayed, weight_decay, adapt=False),
        _group(plain, 0.0, adapt=False),
    ]
    return [group for group in groups if group["params"]]


def state_by_name(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors as `{parameter name: {slot: tensor}}`; no copies are made.

    Parameters that never had a gradient have no state, and are absent.
    """
    return {
        name: dict(optimizer.state[param]) for name, param in named_parameters(optimizer) if optimizer.state.get(param)
    }


def load_state_by_name(optimizer: Optimizer, saved: dict[str, dict[str, Tensor]]) -> None:
    """Replace the optimizer's state by copies of `saved`, on the device and in the layout of each parameter.

    A parameter that is absent in `saved` starts without state, as one that never had a gradient.

    Raises:
        ValueError: `saved` names a parameter that is not there, or has a tensor of another shape; nothing is
            changed then.
    """
    parameters = dict(named_parameters(optimizer))
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, slots in saved.items():
        if name not in parameters:
            raise ValueError(
                f"optimizer state `{name}` belongs to no parameter here; resume with the model that saved it"
            )
        param = parameters[name]
        for slot, tensor in slots.items():
            if tensor.shape != param.shape and tensor.ndim > 0:  # a scalar is a slot like Adam's step count
                raise ValueError(
                    f"optimizer state `{name}.{slot}` must have shape {list(param.shape)}, "
                    f"got {list(tensor.shape)}; resume with the model that saved it"
                )
        state[param] = {slot: _like(param, tensor) for slot, tensor in slots.items()}
    optimizer.state.clear()
    optimizer.state.update(state)


def named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the optimizer with the name that its group carries."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _group(named: dict[str, Tensor], weight_decay: float, *, adapt: bool) -> dict[str, Any]:
    return {
        "params": list(named.values()),
        "param_names": list(named),
        "weight_decay": weight_decay,
        "adapt": adapt,
    }


def _like(param: Tensor, tensor: Tensor) -> Tensor:
    if tensor.shape == param.shape:
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.clone()
