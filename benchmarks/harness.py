"""Races: contestants do the same work in interleaved turns, and are judged by ratios.

Each contestant is a process of its own (`benchmarks.contestant`). After its warm-up every round gives every contestant
one turn of about the same length, in a rotating order, so that whatever else the machine does falls on all alike. The
figures of a row are medians over the rounds; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from benchmarks.contestant import Contestant, ContestantProcess, Turn, WarmUp

MAX_CORES = 1.05  # of one thread, by clocks that are not read at the same moment
LEAST_PEAK_MIB = 1.0  # less than that is the allocator's own coming and going

Unit = Literal["images/s", "steps/s", "s"]
"""Of a median: items a second, or seconds an item."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What must hold of the first contestant against another one."""

    speed: float
    """It is at least this many times as fast."""
    goal: float
    """The ratio to reach."""
    memory: float | None = None
    """It takes at most this share of the other's memory."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the JSON file."""

    work: str
    contestant: str
    median: float
    """Of the rounds' values, in `unit`."""
    unit: Unit
    spread: float
    """Interquartile range of the rounds' values, as a share of the median."""
    cpu_s_per_item: float
    """CPU seconds of all threads and worker processes for one item: one source image, or one call."""
    peak_mib: float
    """Memory that the work takes beyond that of a process which is set up for it."""
    repeats: int
    """Rounds."""
    gpu_peak_mib: float = 0.0
    """The same of the GPU's memory."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Our contestant against another one of the same race."""

    work: str
    first: str
    """Ours."""
    second: str
    ratio: float
    """How many times as fast ours is: the median of the rounds' ratios."""
    spread: float
    """Interquartile range of the rounds' ratios, as a share of their median."""
    rounds: int
    floor: float | None = None
    """What was asserted of the ratio; None if nothing was."""
    goal: float | None = None
    memory: float | None = None
    """Our peak as a share of the other's; None where the other's is too small to be measured."""
    memory_limit: float | None = None
    """What was asserted of that share."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What was measured."""

    work: str
    unit: Unit
    warm_ups: dict[str, WarmUp]
    turns: dict[str, list[Turn]]
    """By contestant, in the order of the rounds."""

    def rows(self) -> list[Row]:
        """One row a contestant."""
        return [self._row(name) for name in self.turns]

    def ratio(self, first: str, second: str) -> float:
        """How many times as fast `first` is as `second`."""
        return statistics.median(self._round_ratios(first, second))

    def ratios(self, floors: Mapping[str, Floor]) -> list[Ratio]:
        """The first contestant against each of the others, with what must hold of it."""
        first, *others = self.turns
        return [self.against(first, second, floors.get(second)) for second in others]

    def against(self, first: str, second: str, floor: Floor | None = None) -> Ratio:
        """One contestant against another one, with what must hold of it."""
        values = self._round_ratios(first, second)
        ours, theirs = self.warm_ups[first].peak_mib, self.warm_ups[second].peak_mib
        return Ratio(
            work=self.work,
            first=first,
            second=second,
            ratio=statistics.median(values),
            spread=_interquartile_range(values) / statistics.median(values),
            rounds=len(values),
            floor=floor.speed if floor else None,
            goal=floor.goal if floor else None,
            memory=max(ours, 0.0) / theirs if theirs >= LEAST_PEAK_MIB else None,
            memory_limit=floor.memory if floor else None,
        )

    def require(self, first: str, floors: dict[str, Floor]) -> None:
        """Assert every floor of `first` against the contestants named."""
        missed = []
        for second, floor in floors.items():
            speed = self.ratio(first, second)
            if speed < floor.speed:
                missed.append(f"{speed:.2f} times as fast as {second}, floor {floor.speed:.3g}")
            ours, theirs = self.warm_ups[first].peak_mib, self.warm_ups[second].peak_mib
            if floor.memory is not None and ours > floor.memory * theirs:
                missed.append(f"at {ours / theirs:.3f} of the memory of {second}, at most {floor.memory}")
        assert not missed, f"{self.work}: {first} is " + "; ".join(missed)

    def require_one_core(self) -> None:
        """Assert that nobody was helped by a second thread or process: CPU seconds no more than wall seconds."""
        busy = [row.contestant for row in self.rows() if row.cpu_s_per_item > MAX_CORES * row.median]
        assert not busy, f"{self.work}: {', '.join(busy)} used more than one core"

    def table(self, first: str, floors: dict[str, Floor]) -> str:
        """Aligned lines: each contestant, and how much faster `first` is."""
        lines = [
            f"{self.work:16} {'median':>10} {self.unit:8} {'spread':>7} {'cpu ms/item':>12} {'peak MiB':>9}"
            f" {'rounds':>7}  {first} is"
        ]
        for row in self.rows():
            lines.append(
                f"{row.contestant:16} {_figure(row.median):>10} {'':8} {row.spread:>7.1%}"
                f" {row.cpu_s_per_item * 1e3:>12.4g} {row.peak_mib:>9.1f} {row.repeats:>7}  "
                + ("" if row.contestant == first else self._verdict(first, row.contestant, floors))
            )
        return "\n".join(lines)

    def _verdict(self, first: str, second: str, floors: dict[str, Floor]) -> str:
        verdict = f"{self.ratio(first, second):.2f}×"
        if second in floors:
            verdict += f" (floor {floors[second].speed:.3g}, goal {floors[second].goal})"
        return verdict

    def _round_ratios(self, first: str, second: str) -> list[float]:
        pairs = zip(self.turns[first], self.turns[second], strict=True)
        return [_speed(ours) / _speed(theirs) for ours, theirs in pairs]

    def _row(self, name: str) -> Row:
        turns = self.turns[name]
        speeds = [_speed(turn) for turn in turns]
        values = [1 / speed for speed in speeds] if self.unit == "s" else speeds
        median = statistics.median(values)
        return Row(
            work=self.work,
            contestant=name,
            median=median,
            unit=self.unit,
            spread=_interquartile_range(values) / median,
            cpu_s_per_item=statistics.median(turn.cpu_seconds / turn.items for turn in turns),
            peak_mib=self.warm_ups[name].peak_mib,
            repeats=len(turns),
            gpu_peak_mib=self.warm_ups[name].gpu_peak_mib,
        )


def race(work: str, unit: Unit, contestants: Sequence[Contestant], *, rounds: int, seconds: float) -> Race:
    """Let contestants do the same work.

    Args:
        work: its name.
        unit: of the medians; an item is an image, or a call.
        contestants: the first one is ours.
        rounds: turns of each contestant.
        seconds: length of a turn; a turn does at least one step of items however long that takes.

    Raises:
        ContestantFailed: a contestant raised, died or hung.
    """
    with ExitStack() as stack:
        processes = []
        for contestant in contestants:
            processes.append(ContestantProcess(contestant))
            stack.callback(processes[-1].close)
        for process in processes:
            process.wait_for_setup()
        warm_ups = {process.name: process.warm_up(seconds) for process in processes}
        turns: dict[str, list[Turn]] = {process.name: [] for process in processes}
        for i in range(rounds):
            shift = i % len(processes)
            for process in processes[shift:] + processes[:shift]:
                turns[process.name].append(process.turn(warm_ups[process.name].items_per_turn, seconds))
    return Race(work=work, unit=unit, warm_ups=warm_ups, turns=turns)


def pooled(races: Sequence[Race]) -> Race:
    """Races of the same work as one, for its rows: all turns of a contestant count, and its highest peak.

    Rounds of different races were not run in turns, so ratios are to be taken from each of them.
    """
    warm_ups: dict[str, WarmUp] = {}
    turns: dict[str, list[Turn]] = {}
    for one in races:
        for name, warm_up in one.warm_ups.items():
            warm_ups[name] = max(warm_up, warm_ups.get(name, warm_up), key=lambda known: known.peak_mib)
            turns.setdefault(name, []).extend(one.turns[name])
    return Race(work=races[0].work, unit=races[0].unit, warm_ups=warm_ups, turns=turns)


def _speed(turn: Turn) -> float:
    return turn.items / turn.seconds


def _interquartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.4g}"
