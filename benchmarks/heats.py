"""Who races whom, where the memory does not hold everyone at once.

A contestant's process holds some memory as long as it lives, and takes more in its turns. Turns never overlap, so a
race needs what all hold and what the hungriest takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contestant import Contestant

PROCESS_MIB = 300.0  # of its own in a process with torch and a peer's packages; 190–225 were measured


def heats(
    work: str, contestants: Sequence[Contestant], available_mib: float
) -> tuple[list[list[Contestant]], list[str]]:
    """One race of all; else races of the first contestant against each other one; alone who fits with nobody.

    Args:
        work: its name, for the remarks.
        contestants: the first one is ours.
        available_mib: memory that the races may take.

    Returns:
        The races, and a line for everything that is not one race of all: who takes no part, and why.
    """
    remarks = []
    fitting = []
    for contestant in contestants:
        if needed_mib([contestant]) <= available_mib:
            fitting.append(contestant)
        else:
            remarks.append(f"{contestant.name} takes no part in {work}: {_shortage([contestant], available_mib)}")
    if needed_mib(fitting) <= available_mib:
        return [fitting] if fitting else [], remarks
    remarks.append(f"{work} is raced in pairs: {_shortage(fitting, available_mib)} for all at once")
    if fitting[0] is not contestants[0]:
        return [[contestant] for contestant in fitting], remarks
    ours, *others = fitting
    races = []
    for other in others:
        if needed_mib([ours, other]) <= available_mib:
            races.append([ours, other])
        else:
            races.append([other])
            remarks.append(f"{other.name} runs alone: {_shortage([ours, other], available_mib)} with {ours.name}")
    if not any(ours in race for race in races):
        races.insert(0, [ours])
    return races, remarks


def needed_mib(contestants: Sequence[Contestant]) -> float:
    """Memory of a race."""
    held = sum(PROCESS_MIB + contestant.held_mib for contestant in contestants)
    return held + max((contestant.work_mib for contestant in contestants), default=0.0)


def _shortage(contestants: Sequence[Contestant], available_mib: float) -> str:
    return f"{needed_mib(contestants) / 1024:.1f} GiB of memory needed, {available_mib / 1024:.1f} GiB available"
