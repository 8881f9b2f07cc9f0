"""What the rate of a run is made of: the simple model by which a profile is judged, and changes are weighed.

Each image takes some seconds of what works on it. Decoding threads read, decode, crop and colour an image one step
after the other, so their seconds add up to the loading side's. A training step is forward, loss, backward,
communication and optimizer one after the other, so theirs add up to the training side's; on a GPU, what the loader has
done there is part of it. The two sides work at the same time, and the slower one sets the pace:

    GPU:    seconds an image = max(loading, copying, training)
    CPU:    seconds an image = max(loading, training, (n · loading + t · training) / C)

On a CPU both take their cores from the same C, n of them to decode and t to compute; the last term is the work of both,
spread over all cores without a gap. It is never the largest where n + t ≤ C. Waiting for storage takes seconds of a
thread and none of a core. A thread more or less changes a side's rate in proportion, up to C, and that of storage and
of communication not at all.
Seconds of a stage are scaled so that they add up to what the whole side was measured to take.

`docs/guides/throughput.md` says the same for users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tools.profile_results import STAGES, Profile

Bound = Literal["loading", "copying", "training", "cores"]
STORAGE = ("storage_cold", "storage_warm")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What one must know beside the profile: the set, the machine and what is installed."""

    set_bytes: int
    """Of all images as they are stored."""
    stored: Literal["jpeg", "raw", "mixed", "files"]
    """How; `files`: a plain folder."""
    mean_pixels: float
    """Of a stored image; 0 where it is not known."""
    longest_side: int
    """Of the stored images, pixels, in the median; 0 where it is not known."""
    free_memory: int
    """Bytes of this machine that the page cache, or the loader, could take."""
    device_memory: int
    """Bytes that the device has: the GPU's, or the machine's."""
    device_free: int
    """Bytes of it that are free."""
    fast_bf16: bool
    """Whether the device multiplies bfloat16 numbers with instructions of its own."""
    has_dali: bool
    """Whether NVIDIA DALI is installed."""

    @property
    def cached(self) -> float:
        """Share of the set that stays in memory from epoch to epoch."""
        return min(1.0, self.free_memory / max(self.set_bytes, 1))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that an image takes, all ranks together, of each thing that works on it."""

    host: dict[str, float]
    """Of the decoding threads, by stage."""
    reading: float
    """Of the decoding threads, waiting for storage, beyond what reading from memory takes."""
    copying: float
    """Of the way to the GPU."""
    device: dict[str, float]
    """Of the training step, by stage, with what the loader has done on a GPU."""
    num_threads: int
    cpu_threads: int
    num_cores: int
    on_cpu: bool
    """Whether the step takes its time from the same cores."""
    in_turn: bool
    """Whether a batch is made by the thread that computes, as `resident` does, while nothing else happens."""

    @property
    def loading(self) -> float:
        """Seconds an image of the loading side."""
        return sum(self.host.values()) + self.reading

    @property
    def training(self) -> float:
        """Seconds an image of the training side."""
        return sum(self.device.values())

    @property
    def core_seconds(self) -> dict[Literal["loading", "training"], float]:
        """What each side takes of the cores, seconds an image, on a CPU."""
        decoding, computing = self._cores(self.num_threads), self._cores(self.cpu_threads)
        return {"loading": decoding * sum(self.host.values()), "training": computing * self.training}

    @property
    def bounds(self) -> dict[Bound, float]:
        """Seconds an image that each thing alone would take; the largest sets the pace."""
        bounds: dict[Bound, float] = {"loading": self.loading, "training": self.training}
        if self.copying > 0.0:
            bounds["copying"] = self.copying
        if self.on_cpu and self.in_turn:
            bounds["cores"] = self.loading + self.training
        elif self.on_cpu:
            bounds["cores"] = sum(self.core_seconds.values()) / self.num_cores
        return bounds

    @property
    def images_per_sec(self) -> float:
        """What the run should reach."""
        return 1.0 / max(self.bounds.values())

    @property
    def crowded(self) -> bool:
        """Whether there are more busy threads than cores."""
        return self.on_cpu and self._cores(self.num_threads) + self._cores(self.cpu_threads) > self.num_cores

    @property
    def side(self) -> Literal["loading", "copying", "training"]:
        """Which side sets the pace; where they share the cores, the one that takes more of their time."""
        bounds = self.bounds
        slowest = max(bounds, key=lambda bound: bounds[bound])
        if slowest != "cores" or bounds["cores"] <= max(self.loading, self.training) * (1.0 + 1e-9):
            return "copying" if slowest == "copying" else "loading" if self.loading > self.training else "training"
        if self.in_turn:
            return "loading" if self.loading > self.training else "training"
        taken = self.core_seconds
        return "loading" if taken["loading"] > taken["training"] else "training"

    def with_threads(self, *, num_threads: int | None = None, cpu_threads: int | None = None) -> Costs:
        """The same with other numbers of threads: rates in proportion, up to the cores; not that of communication."""
        num_threads, cpu_threads = num_threads or self.num_threads, cpu_threads or self.cpu_threads
        decoding = self._cores(self.num_threads) / self._cores(num_threads)
        computing = self._cores(self.cpu_threads) / self._cores(cpu_threads) if self.on_cpu else 1.0
        return replace(
            self,
            host={name: seconds * decoding for name, seconds in self.host.items()},
            device={
                name: seconds * (1.0 if name == "communication" else computing) for name, seconds in self.device.items()
            },
            num_threads=num_threads,
            cpu_threads=cpu_threads,
        )

    def scaled(self, **factors: float) -> Costs:
        """The same with the seconds of some stages multiplied."""
        return replace(
            self,
            host={name: seconds * factors.get(name, 1.0) for name, seconds in self.host.items()},
            device={name: seconds * factors.get(name, 1.0) for name, seconds in self.device.items()},
            reading=self.reading * factors.get("storage_cold", 1.0),
            copying=self.copying * factors.get("host_to_device", 1.0),
        )

    def _cores(self, threads: int) -> int:
        return max(1, min(threads, self.num_cores))


def costs_of(profile: Profile, around: Surroundings) -> Costs:
    """What a profile says of each image.

    Storage counts as read from memory but for the share of the set that memory does not hold, which is read anew in
    each epoch.
    """
    seconds = {name: 1.0 / stage.images_per_sec for name, stage in profile.stages.items()}
    places = {name: stage.place for name, stage in profile.stages.items()}
    sides = {name: stage.side for name, stage in profile.stages.items()}
    loading = {name: s for name, s in seconds.items() if sides[name] == "loading" and name != "host_to_device"}
    host = {name: s for name, s in loading.items() if places[name] == "host" and name != "storage_cold"}
    on_device = {name: s for name, s in loading.items() if places[name] == "device"}
    copying = seconds.get("host_to_device", 0.0)
    measured = 1.0 / profile.loading_images_per_sec
    if sum(host.values()) >= max(copying, sum(on_device.values())):  # else it was not the host that was measured
        host = _scaled_to(host, measured)
    warm = seconds.get("storage_warm", 0.0)
    missed = max(0.0, seconds.get("storage_cold", warm) - warm) * (1.0 - around.cached)
    training = {name: s for name, s in seconds.items() if sides[name] == "training"}
    return Costs(
        host=host,
        reading=missed,
        copying=copying,
        device=_scaled_to(training, 1.0 / profile.training_images_per_sec) | on_device,
        num_threads=profile.num_threads,
        cpu_threads=profile.cpu_threads,
        num_cores=profile.num_cores,
        on_cpu=profile.device == "cpu",
        in_turn=profile.loader == "resident",
    )


def limiting_stage(costs: Costs) -> str:
    """The name of the stage that takes the most time of the side that sets the pace."""
    side = costs.side
    if side == "copying":
        return "host_to_device"
    if side == "training":
        stages = costs.device
    else:
        stages = costs.host | ({"storage_cold": costs.reading} if costs.reading > 0.0 else {})
    return max(sorted(stages, key=STAGES.index), key=lambda name: stages[name])


def _scaled_to(seconds: dict[str, float], total: float) -> dict[str, float]:
    """The same shares of another sum."""
    found = sum(seconds.values())
    if not seconds or not math.isfinite(found) or found <= 0.0:
        return dict(seconds)
    return {name: s * total / found for name, s in seconds.items()}
