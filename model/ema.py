"""An exponential moving average of a method's weights, which often evaluate better than the last ones.

    a ← a + (1 − decay)·(w − a)        after every optimizer step; a starts as w

Sources: Polyak and Juditsky 1992, for averaging; the form is that of EfficientNet's code (tensorflow/tpu) and of timm's
ModelEmaV3. As there, batch norm's running statistics are averaged like weights, so that they are those of the networks
that were averaged; torch's AveragedModel leaves them out by default and asks for a pass over the data instead. What
counts (batches seen) is no mean of anything: it is the method's own.

There is no warm-up of the decay, as in torch, and by default in timm and EfficientNet's code. The weights of step 0
still count decay^t at step t: choose a decay whose memory, 1/(1 − decay) steps, is a small part of the run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of `method`, in float32 (float64 where the method is), on its device and beside it.

    Everything in `method.state_dict()` that is floating is averaged, what the loss learns (its temperature) too. The
    method may be moved, wrapped by an engine or loaded into later; its state must keep its names. Ranks hold the same
    average, since they hold the same weights, and communicate nothing.

    Args:
        method: whose state is followed; the average begins as its state now.
        decay: share of the average that stays in a step, in [0, 1).

    Raises:
        ValueError: a decay outside its range.
    """

    def __init__(self, method: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`train.ema_decay` must be in [0, 1), got {decay}; 0.999 remembers about 1000 steps")
        self._method, self.decay = method, decay
        self._average = {
            name: value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in self._followed().items()
        }

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Take the method's state in, after an optimizer step. The host does not wait for the device.

        Args:
            skip: bool scalar on the method's device; where it is true, a step that was left out, nothing changes.
        """
        followed = self._followed()
        averages = [self._average[name] for name in followed]
        values = [value.to(average.dtype) for value, average in zip(followed.values(), averages, strict=True)]
        if skip is None:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        else:  # the weight stays where `skip` is
            weight = torch.where(skip, 0.0, 1 - self.decay)
            for dtype in {average.dtype for average in averages}:
                of_dtype = [i for i, average in enumerate(averages) if average.dtype == dtype]
                weights = [weight.to(dtype)] * len(of_dtype)
                torch._foreach_lerp_([averages[i] for i in of_dtype], [values[i] for i in of_dtype], weights)

    def state_dict(self) -> dict[str, Tensor]:
        """What `method.state_dict()` would give for the average; no copies are made."""
        return {name: self._average.get(name, value) for name, value in self._method.state_dict().items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Replace the average by copies of what `state_dict` gave; counts come with the method.

        Raises:
            ValueError: `saved` is of another method; nothing is changed then.
        """
        names = self._method.state_dict().keys()
        if saved.keys() != names:
            odd = sorted(saved.keys() ^ names)
            raise ValueError(
                f"the moving average must hold the method's {len(names)} tensors, got {len(saved)}; `{odd[0]}` is only "
                "in one of them: resume with the model that saved it"
            )
        for name, average in self._average.items():
            if saved[name].shape != average.shape:
                raise ValueError(
                    f"the moving average's `{name}` must have shape {list(average.shape)}, got "
                    f"{list(saved[name].shape)}; resume with the model that saved it"
                )
        for name, average in self._average.items():
            average.copy_(saved[name])

    def _followed(self) -> dict[str, Tensor]:
        """Anew each time: engines and moves give parameters other memory."""
        state = self._method.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point()}
