"""A profile that is to be judged, and what an advice is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tools.profile_model import Costs, Surroundings, costs_of
from tools.profile_results import Profile

CONVERT = "convert."  # before options of `tools.convert`
Kind = Literal["options", "convert", "machine"]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing to change."""

    change: dict[str, Any]
    """By name: options of the run (`data.num_threads`), of the conversion (`convert.max_side`), or the `machine`'s."""
    why: str
    """A sentence or two, with the numbers that it rests on."""
    expected_images_per_sec: float
    """What the model makes of it."""
    kind: Kind
    """`options` of the run; `convert`: the images are converted anew; `machine`: other hardware."""
    effect: str = ""
    """What it changes in what is learned; empty: nothing, but for rounding."""
    command: str | None = None
    """That does it, where it is not an option of the run."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def words(self) -> str:
        """What to write, options of the run or a command; or what to have."""
        if self.kind == "machine" and self.command is None:
            return ", ".join(f"{name.partition('.')[2]}: {value}" for name, value in self.change.items())
        return self.command or words_of(self.change)


def words_of(change: dict[str, Any]) -> str:
    """A change as options of a command line; those of a conversion behind its name."""
    of_run = [f"--{name} {plain(value)}" for name, value in change.items() if not name.startswith(CONVERT)]
    of_conversion = [
        f"--{name.removeprefix(CONVERT).replace('_', '-')} {plain(value)}"
        for name, value in change.items()
        if name.startswith(CONVERT)
    ]
    return " ".join([*of_run, *(["tools.convert"] * bool(of_conversion)), *of_conversion])


def plain(value: object) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Case:
    """A profile and its surroundings, as the rules see them."""

    profile: Profile
    around: Surroundings

    @cached_property
    def costs(self) -> Costs:
        """Of each image, in the long run."""
        return costs_of(self.profile, self.around)

    @cached_property
    def held(self) -> float:
        """Share of the modelled rate that was measured, with the set in memory as it is while one measures."""
        return self.profile.together_images_per_sec / replace(self.costs, reading=0.0).images_per_sec

    @property
    def now(self) -> float:
        """Images a second that the run has in the long run: as measured, less what memory does not hold of the set."""
        return self.held * self.costs.images_per_sec

    def expected(self, costs: Costs) -> float:
        """Images a second with other costs.

        The share of the modelled rate that was measured stays; but where threads fight over the cores now and would
        not then, nothing is taken off for it.
        """
        freed = self.costs.crowded and not costs.crowded
        return costs.images_per_sec * (max(self.held, 1.0) if freed else self.held)

    def advice(self, change: dict[str, Any], why: str, costs: Costs, effect: str = "") -> Advice:
        """To change options of the run, after which an image costs `costs`."""
        expected = self.expected(costs)
        return Advice(change=change, why=why, expected_images_per_sec=expected, kind="options", effect=effect)

    def option(self, name: str) -> Any:
        """Of the run's configuration, such as `data.geometry`."""
        value: Any = self.profile.config
        for part in name.split("."):
            value = value[part]
        return value

    @property
    def on_gpu(self) -> bool:
        """Whether it trains on a GPU."""
        return self.profile.device == "cuda"

    @property
    def decoded_bytes(self) -> float:
        """Of a stored image's pixels."""
        return 3.0 * self.around.mean_pixels

    @property
    def decoded_set(self) -> float:
        """Bytes of the pixels of all images; 0 where it is not known."""
        return self.decoded_bytes * self.profile.num_samples
