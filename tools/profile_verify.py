"""Tries advice on this machine: the run as it is and the run as advised take turns, and what came of it is told.

Both are measured as in a run, loader and training step together, in interleaved turns, so that what else the machine
does meets both alike. Advice about the encoding is tried on a sample of the user's images, stored both ways.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.build import open_data
from tools.profile_advice import Diagnosis
from tools.profile_case import Advice, words_of
from tools.profile_model import Surroundings
from tools.profile_rig import IMPOSSIBLE, Rig, changed, of_rank_zero, shares_engine
from tools.profile_sample import encode_options, on_sample, rows_for, write_sample
from train.config import PretrainConfig, flatten, resolved_dict
from train.runtime import Ranks, cores_per_rank

ROUNDS, FEWEST_ROUNDS = 5, 3
MAX_TRIALS = 3
MAX_TURNS = 40  # turns' worth of seconds: after them no other trial begins; after half of them a trial has few rounds
LEAST_S = 60.0  # that the trials may take, however short a turn is
KEPT = 1.02  # the gain below which a change is not worth its words
ROOM_FOR_TWO = 0.45  # of the device's memory: above it, both engines do not fit beside each other


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One advice, tried."""

    change: dict[str, Any]
    expected_images_per_sec: float | None
    """What the model made of it."""
    before: float | None = None
    """Images a second of the run as it is, the median of its turns; None: it could not be measured."""
    after: float | None = None
    """Of the run as advised."""
    ratio: float | None = None
    """The median of the ratios of single rounds."""
    ratios: tuple[float, ...] = ()
    """Of the rounds."""
    kept: bool = False
    """Whether it helped: by two per cent in the median, and in all rounds but one."""
    reason: str | None = None
    """Why it could not be measured."""

    @property
    def words(self) -> str:
        """What came of it, in a line."""
        if self.before is None or self.after is None:
            return f"could not be measured ({self.reason})"
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"{self.before:,.0f} → {self.after:,.0f} images/s, {self.ratio:.2f}× ({low:.2f} to {high:.2f} in "
            f"{len(self.ratios)} rounds); expected {self.expected_images_per_sec or 0:,.0f}"
        )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What became of the advice: the trial that helped, or else the first one that could be measured."""

    trials: tuple[Trial, ...] = ()
    wanted: bool = True
    """Whether it was asked for."""

    @property
    def chosen(self) -> Trial | None:
        """None where nothing was measured."""
        measured = [trial for trial in self.trials if trial.ratio is not None]
        return next((trial for trial in measured if trial.kept), measured[0] if measured else None)

    @property
    def words(self) -> str:
        """The verdict."""
        if not self.wanted:
            return "not asked for"
        if not self.trials:
            return "there was no advice that can be tried on this machine"
        if self.chosen is None:
            return "no advice could be measured"
        if self.chosen.kept:
            return f"{words_of(self.chosen.change)} helps here, {self.chosen.ratio:.2f}×: keep it"
        return "none of what was tried helps here: keep the configuration as it is"

    def to_json(self) -> dict[str, Any]:
        """Plain values: those of the trial that counts, and all of them under `trials`."""
        nothing = Trial(change={}, expected_images_per_sec=None, reason=self.words)
        return asdict(self.chosen or nothing) | {"trials": [asdict(trial) for trial in self.trials]}


def verify(
    diagnosis: Diagnosis, around: Surroundings, config: PretrainConfig, ranks: Ranks, *, seconds: float
) -> Verified:
    """Try the best advice that can be tried here, the next one if it does not help, and so on. All ranks must call.

    Args:
        diagnosis: with the advice; that of rank 0 counts.
        around: of this machine.
        config: the run's, unchanged.
        ranks: of this process.
        seconds: of one turn.
    """
    alone = of_rank_zero(diagnosis.profile.memory["peak_bytes"] > ROOM_FOR_TWO * around.device_memory, ranks)
    trials: list[Trial] = []
    began = time.monotonic()
    for advice in _candidates(diagnosis.advice, ranks):
        if of_rank_zero(time.monotonic() - began > max(LEAST_S, MAX_TURNS * seconds), ranks):
            break
        trial = _try(advice, config, ranks, seconds=seconds, one_at_a_time=alone)
        trials.append(trial)
        if trial.kept:
            break
    return Verified(trials=tuple(trials))


def _candidates(advice: list[Advice], ranks: Ranks) -> list[Advice]:
    """What can be tried here, in rank 0's words: others may have other cores."""
    possible = [one for one in advice if one.kind != "machine"][:MAX_TRIALS]
    told = of_rank_zero([one.to_json() for one in possible], ranks)
    return [Advice(**one) for one in told]


def _try(advice: Advice, config: PretrainConfig, ranks: Ranks, *, seconds: float, one_at_a_time: bool) -> Trial:
    tried = Trial(change=advice.change, expected_images_per_sec=advice.expected_images_per_sec)
    try:
        with _contestants(advice, config, ranks) as (before, after):
            rounds = _race(before, after, ranks, seconds=seconds, one_at_a_time=one_at_a_time)
    except IMPOSSIBLE as error:
        return replace(tried, reason=" ".join(str(error).split()))
    ratios = tuple(new / old for old, new in rounds)
    ratio = statistics.median(ratios)
    return replace(
        tried,
        before=statistics.median(old for old, _ in rounds),
        after=statistics.median(new for _, new in rounds),
        ratio=ratio,
        ratios=ratios,
        kept=ratio >= KEPT and sum(one > 1.0 for one in ratios) >= len(ratios) - 1,
    )


@contextmanager
def _contestants(
    advice: Advice, config: PretrainConfig, ranks: Ranks
) -> Iterator[tuple[PretrainConfig, PretrainConfig]]:
    """The configuration as it is, and as advised."""
    if advice.kind == "options":
        yield config, changed(config, advice.change)
        return
    data, num_rows, workers = open_data(config.data), rows_for(config), cores_per_rank(ranks)
    with tempfile.TemporaryDirectory(prefix="twinview-profile-") as mine:
        folder = Path(mine)
        write_sample(data, folder / "after.beton", encode_options(advice.change), num_rows=num_rows, workers=workers)
        if config.data.loader == "folder":  # what it reads cannot be sampled; its own images are the comparison
            yield config, on_sample(config, folder / "after.beton")
            return
        write_sample(data, folder / "before.beton", None, num_rows=num_rows, workers=workers)
        yield on_sample(config, folder / "before.beton"), on_sample(config, folder / "after.beton")


def _race(
    before: PretrainConfig, after: PretrainConfig, ranks: Ranks, *, seconds: float, one_at_a_time: bool
) -> list[tuple[float, float]]:
    """Images a second of both, in `ROUNDS` rounds of a turn each; who begins changes from round to round.

    Where steps take so long that turns do, in fewer.
    """
    began = time.monotonic()
    differing = [name for name in _flat(before) if _flat(before)[name] != _flat(after)[name]]
    shared, configs = shares_engine(differing), (before, after)
    rounds: list[tuple[float, float]] = []
    with ExitStack() as stack:
        rigs: dict[int, Rig] = {}

        def turn(i: int) -> float:
            if one_at_a_time and not shared:
                with ExitStack() as own:
                    rig = Rig(configs[i], ranks)
                    own.callback(rig.close)
                    return rig.turn(seconds).images_per_sec
            if i not in rigs:
                rigs[i] = Rig(configs[i], ranks, like=next(iter(rigs.values()), None) if shared else None)
                stack.callback(rigs[i].close)
            return rigs[i].turn(seconds).images_per_sec

        if not one_at_a_time or shared:  # what is compiled or filled at the first step is nobody's turn
            turn(0), turn(1)
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            rates = {i: turn(i) for i in order}
            rounds.append((rates[0], rates[1]))
            late = time.monotonic() - began > max(LEAST_S, MAX_TURNS * seconds) / 2
            if of_rank_zero(late and len(rounds) >= FEWEST_ROUNDS, ranks):
                break
    return rounds


def _flat(config: PretrainConfig) -> dict[str, Any]:
    return flatten(resolved_dict(config))
