"""Contestants that do not fit in memory together race in pairs, alone, or not at all, and it is said why."""

import pytest

from benchmarks.conftest import Bench, Settings
from benchmarks.contestant import Contestant
from benchmarks.harness import Floor
from benchmarks.heats import PROCESS_MIB, heats, needed_mib
from pipelines.buffers import free_host_memory
from tests.benchmarks.contestants import sleeper

GIB = 1024


def entrant(name, held, work=0.0):
    """In GiB, its process included."""
    return Contestant(name=name, setup=sleeper, held_mib=held * GIB - PROCESS_MIB, work_mib=work * GIB)


def names(races):
    return [[contestant.name for contestant in race] for race in races]


OURS, LEAN, WIDE = entrant("ours", 1, 1), entrant("lean", 1, 2), entrant("wide", 1, 9)


def test_a_race_needs_what_all_hold_and_what_one_takes_in_its_turn():
    assert needed_mib([OURS, LEAN, WIDE]) == pytest.approx(12 * GIB)
    assert needed_mib([LEAN]) == pytest.approx(3 * GIB)
    assert needed_mib([Contestant(name="small", setup=sleeper)]) == PROCESS_MIB


def test_all_race_together_where_they_fit():
    assert heats("w", [OURS, LEAN, WIDE], 12.01 * GIB) == ([[OURS, LEAN, WIDE]], [])


def test_pairs_where_two_fit():
    others = [entrant(name, 9.5, 0.1) for name in ("a", "b")]
    races, remarks = heats("w", [entrant("ours", 9.5, 0.5), *others], 20 * GIB)
    assert names(races) == [["ours", "a"], ["ours", "b"]]
    assert remarks == ["w is raced in pairs: 29.0 GiB of memory needed, 20.0 GiB available for all at once"]


def test_who_fits_with_nobody_runs_alone():
    races, remarks = heats("w", [OURS, entrant("a", 4), entrant("b", 7.5)], 8 * GIB)
    assert names(races) == [["ours", "a"], ["b"]]
    assert remarks[1:] == ["b runs alone: 9.5 GiB of memory needed, 8.0 GiB available with ours"]
    races, _ = heats("w", [OURS, entrant("a", 7.5), entrant("b", 7.5)], 8 * GIB)
    assert names(races) == [["ours"], ["a"], ["b"]]


def test_who_does_not_fit_is_left_out_by_name_and_the_others_race():
    races, remarks = heats("w", [OURS, LEAN, WIDE], 5 * GIB)
    assert names(races) == [["ours", "lean"]]
    assert remarks == ["wide takes no part in w: 10.0 GiB of memory needed, 5.0 GiB available"]
    races, remarks = heats("w", [OURS, LEAN, WIDE], 2.5 * GIB)
    assert names(races) == [["ours"]]
    assert len(remarks) == 2


def test_without_ours_the_others_still_give_rows():
    races, remarks = heats("w", [WIDE, entrant("a", 4), entrant("b", 5)], 8 * GIB)
    assert names(races) == [["a"], ["b"]]
    assert remarks[0] == "wide takes no part in w: 10.0 GiB of memory needed, 8.0 GiB available"
    assert heats("w", [WIDE], 8 * GIB)[0] == []


def test_rows_of_who_could_race_and_a_line_for_who_could_not(capsys):
    bench = Bench(Settings(workers=1, rounds=3, seconds=0.01, images=1))
    free = free_host_memory() / 2**20
    held = {"ours": 0.0, "a": 0.6 * free, "b": 0.6 * free, "huge": 9 * free}  # none of it is really taken
    entrants = [
        Contestant(name=name, setup=sleeper, arguments=(0.001,), held_mib=mib, step=5) for name, mib in held.items()
    ]
    slow = {name: Floor(speed=0.01, goal=1) for name in held}
    bench.race("w", "s", entrants, slow, max_rounds=2, one_core=True)
    assert [(row.contestant, row.repeats) for row in bench.rows] == [("ours", 4), ("a", 2), ("b", 2)]
    assert all(0.001 <= row.median < 0.1 for row in bench.rows)
    printed = capsys.readouterr().out
    assert printed.count("(floor 0.01, goal 1)") == 2
    assert "\nhuge takes no part in w: " in printed
    assert "\nw is raced in pairs: " in printed
    with pytest.raises(pytest.skip.Exception, match=r"huge takes no part in w: .* GiB of memory needed, .* available"):
        bench.race("w", "s", entrants[-1:], {})
