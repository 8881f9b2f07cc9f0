"""What a loader does with whole batches: copies to a GPU, crops and colours there, or by the thread that asks for them.

On a GPU, work lies between two events of its stream; the host waits for the second alone.

Legend: N images of a rank's batch, V views.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.ffcv_loader import FFCVLoader
from pipelines.geometry.crop_resize import crop_resize
from pipelines.params import ViewParams
from pipelines.photometric.chain import photometric_chain
from pipelines.recipe import Recipe
from pipelines.rendering import Rendering
from pipelines.resident_loader import ResidentLoader

MIN_REPEATS = 3
HEAD_START = 4_000_000  # cycles: 2 ms


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a stage took."""

    seconds: list[float]
    """For a batch of this rank, once for each time that it was measured."""
    how: str
    place: Literal["host", "device"] = "host"


def after_host(loader: FFCVLoader, made: Rendering, seconds: float) -> dict[str, Times]:
    """Copies to a GPU, and crops and colours there."""
    if loader.renderer.target == "views":
        return {}
    times, out, device = {}, made.out, loader.device
    if loader.sender.stream is not None:
        times["host_to_device"] = Times(
            seconds=_repeat(seconds, lambda: _copy(loader, made.out)),
            how=f"{made.out.nbytes} bytes a batch from pinned memory, on the copies' stream",
            place="device",
        )
        (out,) = loader.sender.send(made.out).receive()
    where = _where(device)
    if loader.renderer.target == "images":
        times["crop"] = Times(
            seconds=_repeat(seconds, lambda: timed(device, lambda: loader.crops(made, out))),
            how=f"every view, cut and resized {where}",
            place=_place(device),
        )
        crops = loader.crops(made, out)
    else:
        crops = loader.renderer.views(made, out)
    return times | colour_times(crops, made.params, loader.recipe, loader.dtype, seconds)


def _copy(loader: FFCVLoader, out: Tensor) -> float:
    """Seconds of one copy on its stream."""
    stream = loader.sender.stream
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record(stream)
    loader.sender.send(out)
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def resident_times(loader: ResidentLoader, seconds: float) -> dict[str, Times]:
    """Nothing is read, decoded or copied in a step."""
    device = loader.device
    images, params, *_ = loader.select(0, 0)

    def cut() -> list[Tensor]:
        selected, drawn, *_ = loader.select(0, 0)
        return [crop_resize(selected, drawn[:, v], view) for v, view in enumerate(loader.recipe.views)]

    times = {
        "crop": Times(
            seconds=_repeat(seconds, lambda: timed(device, cut)),
            how=f"drawing, and every view cut and resized {_where(device)}",
            place=_place(device),
        )
    }
    crops = [crop_resize(images, params[:, v], view) for v, view in enumerate(loader.recipe.views)]
    return times | colour_times(crops, params, loader.recipe, loader.dtype, seconds)


def colour_times(
    crops: list[Tensor], params: ViewParams, recipe: Recipe, dtype: torch.dtype, seconds: float
) -> dict[str, Times]:
    """The photometric chain on whole batches, by the thread that takes them or on the GPU."""
    device = crops[0].device

    def colour() -> None:
        for v, view in enumerate(recipe.views):
            photometric_chain(crops[v], params[:, v], view, recipe, dtype)

    colour()  # compiled
    return {
        "photometric": Times(
            seconds=_repeat(seconds, lambda: timed(device, colour)),
            how=f"every view, coloured and normalised {_where(device)}",
            place=_place(device),
        )
    }


def _place(device: torch.device) -> Literal["host", "device"]:
    return "device" if device.type == "cuda" else "host"


def _where(device: torch.device) -> str:
    return "on the GPU" if device.type == "cuda" else "by the thread that takes batches"


def _repeat(seconds: float, measure: Callable[[], float]) -> list[float]:
    """What `measure` returns, for a third of the time that a measurement may take."""
    found: list[float] = []
    began = time.perf_counter()
    measure()
    while len(found) < MIN_REPEATS or time.perf_counter() - began < seconds / 3:
        found.append(measure())
    return found


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes on a device: between two events of a GPU's stream, else on the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]  # so that the host's own work is done before the GPU comes to the first event
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
