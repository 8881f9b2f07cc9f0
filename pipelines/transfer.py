"""Copies to the device that run while it works on something else.

On a GPU they have a stream of their own: a batch that is decoded is sent while the GPU computes with an earlier one,
and the GPU itself waits for the copy where it is used; the host never does. Elsewhere a copy is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Tensors on their way to the device."""

    tensors: tuple[Tensor, ...]
    arrival: torch.cuda.Event | None

    def receive(self) -> tuple[Tensor, ...]:
        """The tensors, for use on the current stream."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.arrival)
            for tensor in self.tensors:
                tensor.record_stream(stream)  # its memory was allocated for the stream of the copies
        return self.tensors


class Sender:
    """Sends tensors to one device.

    Args:
        device: where they go.

    Attributes:
        stream: of the copies; None: the device is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, *tensors: Tensor) -> Sent:
        """Begin to copy; host tensors are pinned where the device is a GPU, and may be dropped at once."""
        if self.stream is None:
            return Sent(tensors=tuple(tensor.to(self._device) for tensor in tensors), arrival=None)
        with torch.cuda.stream(self.stream):
            copies = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(self.stream)
        return Sent(tensors=copies, arrival=arrival)
