"""A diagnosis as text for a terminal: the stages, the verdict, what to change, what came of it."""

from __future__ import annotations

from collections.abc import Iterator

from tools.profile_advice import Diagnosis
from tools.profile_case import words_of
from tools.profile_results import Profile
from tools.profile_sweep import Cell, best_of
from tools.profile_verify import Verified

LIMITS, FIRST_EPOCH = "◀ limits", "first epoch alone"
HEADINGS = ("stage", "images/s", "ms a batch", "±", "headroom", "")
WHOLES = {
    "loading_images_per_sec": "loading, alone",
    "training_images_per_sec": "training, alone",
    "together_images_per_sec": "together",
}


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The stages in a table, the verdict and the advice."""
    profile = diagnosis.profile
    parts = [heading(profile), "", *_stages(diagnosis), "", f"limiter: {diagnosis.limiter}. {diagnosis.reason}."]
    parts += [f"note: {note}." for note in diagnosis.notes]
    return "\n".join([*parts, "", *_advice(diagnosis)])


def heading(profile: Profile) -> str:
    """What was measured, in a line."""
    encoder = profile.encoder
    sk = ", SK" if encoder.get("sk") else ""
    ranks = f"{profile.world_size} ranks" if profile.world_size > 1 else "one rank"
    return (
        f"{profile.config['data']['path']} on {profile.device_name}: ResNet-{encoder['depth']} "
        f"({encoder['width']:g}×{sk}), views of {profile.image_side}, batch {profile.global_batch_size}, "
        f"{profile.precision}; {ranks} of {profile.num_cores} cores, loader {profile.loader}; threads: "
        f"{profile.num_threads} to decode, {profile.cpu_threads} to compute"
    )


def verified_text(verified: Verified) -> str:
    """What became of the advice that was tried."""
    lines = [f"tried: {words_of(trial.change)}: {trial.words}" for trial in verified.trials] or ["tried: nothing"]
    return "\n".join([*lines, f"verdict: {verified.words}."])


def sweep_text(cells: list[Cell]) -> str:
    """Workers × batch × loader, the best marked."""
    best = best_of(cells)
    rows = [
        (
            cell.loader,
            str(cell.num_threads),
            str(cell.global_batch_size),
            "" if cell.images_per_sec is None else f"{cell.images_per_sec:,.0f}",
            "" if cell.data_wait is None else f"{cell.data_wait:.0%}",
            cell.reason or ", ".join(["◀ best"] * (cell is best) + ["now"] * cell.is_now),
        )
        for cell in cells
    ]
    return "\n".join(_columns([("loader", "workers", "batch", "images/s", "data-wait", ""), *rows]))


def mark_of(name: str, diagnosis: Diagnosis) -> str:
    """What is to be said of a stage beside its rate."""
    if name == diagnosis.limiter:
        return LIMITS
    return FIRST_EPOCH if name == "storage_cold" and diagnosis.cached == 1.0 else ""


def _stages(diagnosis: Diagnosis) -> list[str]:
    profile = diagnosis.profile
    rows: list[tuple[str, ...]] = [HEADINGS]
    for name, stage in profile.stages.items():
        mark = mark_of(name, diagnosis) or ("on the GPU" if stage.place == "device" else "")
        rows.append(
            (
                name,
                f"{stage.images_per_sec:,.0f}",
                f"{1000 * stage.seconds_per_batch:,.2f}",
                f"{stage.spread:.0%}",
                f"{diagnosis.headroom[name]:.1f}×",
                mark,
            )
        )
    for field, words in WHOLES.items():
        rate = getattr(profile, field)
        wait = f"data-wait {profile.data_wait:.0%}" if field == "together_images_per_sec" else ""
        headroom = f"{rate / profile.together_images_per_sec:.1f}×"
        rows.append((words, f"{rate:,.0f}", f"{1000 * profile.global_batch_size / rate:,.2f}", "", headroom, wait))
    lines = _columns(rows)
    return [*lines[: -len(WHOLES)], "─" * max(map(len, lines)), *lines[-len(WHOLES) :]]


def _advice(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.advice:
        yield f"advice: none; nothing known would gain more than a few per cent while {diagnosis.limiter} limits"
        return
    now = diagnosis.sustained_images_per_sec
    yield f"advice, with what the model expects ({now:,.0f} images/s now):"
    for number, advice in enumerate(diagnosis.advice, 1):
        gain = f"{advice.expected_images_per_sec:,.0f} images/s, {advice.expected_images_per_sec / now:.2f}×"
        yield f"{number:3}. {advice.words}  ({gain})"
        yield f"     {advice.why}."
        if advice.effect:
            yield f"     Mind: {advice.effect}."


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned: the first and the last column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
