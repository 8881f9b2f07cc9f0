"""Judges a profile: which stage limits, the room that every other has, and what to change.

Pure functions: `Profile`, `Surroundings` → `Diagnosis`. The model behind them is in `tools.profile_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tools import profile_remedies as loading
from tools import profile_remedies_training as training
from tools.profile_case import Advice, Case
from tools.profile_model import Surroundings, limiting_stage
from tools.profile_results import Profile

WORTHWHILE = 1.03  # expected gain below which nothing is advised: about what two measurements of one thing differ by
MAX_ADVICE = 8
BUSY = 1.5  # threads that want a core, for each core: a measurement alone has about one
HINDERED = 0.85  # share of the modelled rate below which the two sides are said to hinder one another
RULES: tuple[Callable[[Case], Iterator[Advice]], ...] = (
    loading.threads,
    loading.loaders,
    loading.geometry,
    loading.less_decoding,
    loading.prefetching,
    loading.encoding,
    loading.storage,
    training.precision,
    training.recomputation,
    training.compilation,
    training.batch_size,
    training.zero_stage,
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a profile means."""

    profile: Profile
    limiter: str
    """The stage that limits: the slowest of the side that sets the pace."""
    side: Literal["loading", "copying", "training"]
    """That side."""
    headroom: dict[str, float]
    """By stage: how many times the run's rate it could do by itself."""
    predicted_images_per_sec: float
    """What the model makes of loading and training as they were measured alone."""
    sustained_images_per_sec: float
    """What the run has in the long run: as measured, less what memory does not hold of the set."""
    reason: str
    """Why that stage, in a sentence."""
    cached: float
    """Share of the set that stays in memory from epoch to epoch; 1: cold storage sets the pace of the first alone."""
    notes: list[str]
    """What else one should know."""
    advice: list[Advice]
    """Best first."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, the profile included."""
        profile = self.profile
        return {
            "limiter": self.limiter,
            "side": self.side,
            "reason": self.reason,
            "stages_images_per_sec": {name: stage.images_per_sec for name, stage in profile.stages.items()},
            "headroom": self.headroom,
            "loading_images_per_sec": profile.loading_images_per_sec,
            "training_images_per_sec": profile.training_images_per_sec,
            "together_images_per_sec": profile.together_images_per_sec,
            "predicted_images_per_sec": self.predicted_images_per_sec,
            "sustained_images_per_sec": self.sustained_images_per_sec,
            "data_wait": profile.data_wait,
            "cached": self.cached,
            "notes": self.notes,
            "advice": [advice.to_json() for advice in self.advice],
            "profile": profile.to_json(),
        }


def diagnose(profile: Profile, around: Surroundings) -> Diagnosis:
    """Judge a profile."""
    case = Case(profile, around)
    limiter = limiting_stage(case.costs)
    return Diagnosis(
        profile=profile,
        limiter=limiter,
        side=case.costs.side,
        headroom={
            name: stage.images_per_sec / profile.together_images_per_sec for name, stage in profile.stages.items()
        },
        predicted_images_per_sec=replace(case.costs, reading=0.0).images_per_sec,
        sustained_images_per_sec=case.now,
        reason=_reason(case, limiter),
        cached=around.cached,
        notes=list(_notes(case)),
        advice=advise(case),
    )


def advise(case: Case) -> list[Advice]:
    """What is worth trying, best first; at equal expectation first what changes nothing that is learned."""
    found = [advice for rule in RULES for advice in rule(case)]
    worthwhile = [advice for advice in found if advice.expected_images_per_sec >= WORTHWHILE * case.now]
    return sorted(worthwhile, key=lambda advice: _rank(advice, case.now))[:MAX_ADVICE]


def _rank(advice: Advice, now: float) -> tuple[float, int, int]:
    """By gain in steps of a tenth, within which the model cannot tell; then by what it costs the user."""
    kinds = ("options", "convert", "machine")
    return -round(10.0 * advice.expected_images_per_sec / now), bool(advice.effect), kinds.index(advice.kind)


def _reason(case: Case, limiter: str) -> str:
    costs, profile = case.costs, case.profile
    decoding, computing = f"loading {1 / max(costs.loading, 1e-12):,.0f}", f"training {1 / costs.training:,.0f}"
    rates = f"{decoding} images/s alone, {computing}"
    if costs.side == "copying":
        return f"copies to the GPU take {1 / costs.copying:,.0f} images/s at most; {rates}"
    stages = costs.device if costs.side == "training" else costs.host | {"storage_cold": costs.reading}
    share = stages[limiter] / sum(stages.values())
    where = f"of {costs.side}'s time {limiter} takes {share:.0%}; {rates}"
    if costs.in_turn and costs.on_cpu:
        return f"{where}; batches are made by the thread that trains, in turn with it"
    if not costs.crowded or costs.bounds["cores"] <= max(costs.loading, costs.training) * (1 + 1e-9):
        return where
    taken = costs.core_seconds
    ours, others = ("loading", "training") if costs.side == "loading" else ("training", "loading")
    return (
        f"{where}; both share {profile.num_cores} cores, of which {ours} takes "
        f"{taken[ours] / (taken[ours] + taken[others]):.0%} of the time"  # type: ignore[index]
    )


def _notes(case: Case) -> Iterator[str]:
    profile, around = case.profile, case.around
    cold = profile.stages.get("storage_cold")
    if around.cached < 1.0:
        yield (
            f"memory holds {around.cached:.0%} of the set's {around.set_bytes / 1e9:.1f} GB: the rest is read anew in "
            f"each epoch; the {profile.together_images_per_sec:,.0f} images/s above are of a sample in memory, in the "
            f"long run expect {case.now:,.0f}"
        )
    elif cold is not None and cold.images_per_sec < profile.together_images_per_sec:
        yield (
            f"the first epoch reads from storage, at most {cold.images_per_sec:,.0f} images/s; then the set lies in "
            "memory"
        )
    load, cores = profile.environment.get("load", [0.0])[0], profile.environment.get("num_cores", profile.num_cores)
    if load > BUSY * cores:
        yield f"this machine is busy (load {load:.1f} on {cores} cores): the figures are of what others leave"
    if case.held < HINDERED:
        why = "they hinder one another on the same cores" if case.costs.crowded else "something beside them takes time"
        yield f"together the two sides reach {case.held:.0%} of what the model makes of each alone: {why}"
    if profile.data_wait > 0.05 and case.costs.side == "training" and not case.costs.in_turn:
        yield f"the step waited {profile.data_wait:.0%} of the time although loading is not the slower side"
