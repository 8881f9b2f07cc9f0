"""Two results of the same benchmarks, before and after a change: `python -m benchmarks.compare OLD.json NEW.json`.

What is compared is our ratio to each other contestant of a race, which another machine, or more load on this one,
changes little. On an equal machine (processor, cores, GPUs, workers) our own medians are compared as well. A change
counts when it is larger than the tolerance and than the noise: half of the interquartile range of the old value and
half of that of the new one, so that the middle halves of both do not overlap.

Exit code 0 without regressions, 1 with some, 2 where the files are no two results of the same benchmarks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import PACKAGES
from benchmarks.harness import Row
from benchmarks.results import Results, figure, read_results
from train.cli import run

MACHINE = ("device", "cores", "gpus")
ABOUT = ("python", "driver", *PACKAGES)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure, then and now."""

    work: str
    figure: str
    """What it is."""
    old: float
    new: float
    old_spread: float
    """Interquartile range as a share of the value."""
    new_spread: float
    unit: str
    """A row's, or ×."""

    @property
    def share(self) -> float:
        """By which the speed rose, or fell (negative)."""
        growth = self.new / self.old
        return (1 / growth if self.unit == "s" else growth) - 1

    @property
    def noise(self) -> float:
        """Half of both interquartile ranges, as a share of the old speed."""
        return (self.old_spread + self.new_spread * (1 + self.share)) / 2

    def verdict(self, tolerance: float) -> str:
        """`slower` for a regression, `faster` for its opposite, else empty, or why a large change is neither."""
        if abs(self.share) <= tolerance:
            return ""
        if abs(self.share) <= self.noise:
            return "within the spread"
        return "slower" if self.share < 0 else "faster"


def changes(old: Results, new: Results) -> list[Change]:
    """Of every figure that both have.

    Raises:
        ValueError: a work is measured in another unit, or the files have no work in common.
    """
    units, old_units = new.units(), old.units()
    common = [work for work in units if work in old_units]
    for work in common:
        if units[work] != old_units[work]:
            raise ValueError(
                f"`{work}` must be measured in the same unit in both files, got {old_units[work]} and {units[work]}"
            )
    if not common:
        raise ValueError(
            f"both files must hold results of the same benchmarks, got {_some(old_units)} and {_some(units)}"
        )
    return [*_of_ratios(old, new), *(_of_medians(old, new) if same_machine(old, new) else [])]


def same_machine(old: Results, new: Results) -> bool:
    """Whether seconds of one can be set against seconds of the other."""
    alike = all(old.environment.get(name) == new.environment.get(name) for name in MACHINE)
    return alike and old.settings.get("workers") in (None, new.settings.get("workers"))


def _of_ratios(old: Results, new: Results) -> Iterator[Change]:
    known = {(ratio.work, ratio.first, ratio.second): ratio for ratio in old.ratios}
    for ratio in new.ratios:
        if before := known.get((ratio.work, ratio.first, ratio.second)):
            yield Change(
                work=ratio.work,
                figure=f"{ratio.first} / {ratio.second}",
                old=before.ratio,
                new=ratio.ratio,
                old_spread=before.spread,
                new_spread=ratio.spread,
                unit="×",
            )


def _of_medians(old: Results, new: Results) -> Iterator[Change]:
    """Of each work's first contestant, which is ours: what others do is not ours to answer for."""
    known = {(row.work, row.contestant): row for row in old.rows}
    ours: dict[str, Row] = {}
    for row in new.rows:
        ours.setdefault(row.work, row)
    for row in ours.values():
        if before := known.get((row.work, row.contestant)):
            yield Change(
                work=row.work,
                figure=row.contestant,
                old=before.median,
                new=row.median,
                old_spread=before.spread,
                new_spread=row.spread,
                unit=row.unit,
            )


def report(old: Results, new: Results, found: Sequence[Change], tolerance: float) -> str:
    """Both machines, the table, what only one of the files has, and the sum."""
    width = max(len(change.work) for change in found)
    wide = max(len(change.figure) for change in found)
    lines = [f"old: {_about(old)}", f"new: {_about(new)}", *_remarks(old, new), ""]
    lines.append(f"{'work':{width}}  {'figure':{wide}}  {'old':>14} {'new':>14} {'change':>8} {'noise':>7}")
    for change in found:
        then, now = figure(change.old, change.unit), figure(change.new, change.unit)
        line = f"{change.work:{width}}  {change.figure:{wide}}  {then:>14} {now:>14} {change.share:>+8.1%}"
        lines.append(f"{line} {change.noise:>7.1%}  {change.verdict(tolerance)}".rstrip())
    verdicts = [change.verdict(tolerance) for change in found]
    slower, faster = verdicts.count("slower"), verdicts.count("faster")
    lines += ["", f"{len(found)} figures: {slower} slower by more than {tolerance:.0%}, {faster} faster"]
    return "\n".join(lines)


def _about(results: Results) -> str:
    about = results.environment
    machine = [f"{about.get('cores', '?')} cores of {about.get('device', 'an unknown processor')}"]
    machine += [about["gpus"]] if "gpus" in about else []
    return ", ".join([*machine, f"load {about.get('load', 0.0):.1f}", f"commit {str(about.get('commit', '?'))[:12]}"])


def _remarks(old: Results, new: Results) -> Iterator[str]:
    if not same_machine(old, new):
        yield "another machine, or another number of workers: ratios alone are compared"
    if old.images and new.images and set(old.images) != set(new.images):
        yield f"other images: {'; '.join(old.images)}; now {'; '.join(new.images)}"
    for name in ABOUT:
        then, now = old.environment.get(name), new.environment.get(name)
        if then and now and then != now:
            yield f"{name}: {then}, now {now}"
    for results, other, which in ((old, new, "old"), (new, old, "new")):
        missing = [work for work in results.units() if work not in other.units()]
        if missing:
            yield f"only in the {which} file: {', '.join(missing)}"


def _some(names: Iterable[str]) -> str:
    first, *others = [*names, "none"]
    return f"{first} and {len(others) - 1} more" if len(others) > 1 else first


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="What became slower between two results of the same benchmarks.",
        allow_abbrev=False,
    )
    parser.add_argument("old", type=Path, metavar="OLD.json", help="what `--bench-json` wrote before")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="and after")
    parser.add_argument("--tolerance", type=float, default=0.1, help="share that is let pass (default: 0.1)")
    args = parser.parse_args()
    if not 0 <= args.tolerance < 1:
        raise ValueError(f"`--tolerance` must be at least 0 and less than 1, got {args.tolerance}")
    old, new = read_results(args.old), read_results(args.new)
    found = changes(old, new)
    if not found:
        raise ValueError(f"{args.old} and {args.new} must have a ratio or a median in common, found none")
    print(report(old, new, found, args.tolerance))
    return 1 if any(change.verdict(args.tolerance) == "slower" for change in found) else 0


if __name__ == "__main__":
    run(main)
