"""A training contest as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.training_contest import Contest

COLORS = {"twinview": "#1f6feb", "lightly": "#d97706", "start": "#8b949e"}
WIDTH, HEIGHT, DPI = 8.0, 3.2, 150  # inches, and pixels of one


def table(contest: Contest) -> str:
    """Markdown: a line for each seed and contestant."""
    lines = [
        "| seed | contestant | images/s | CPU ms/image | kNN on h | linear on h |",
        "|---|---|---|---|---|---|",
    ]
    for seed, accuracy in contest.start.items():
        lines.append(f"| {seed} | at the start | | | {accuracy.knn:.1%} | {accuracy.linear:.1%} |")
        for one in contest.outcomes:
            if one.seed == seed:
                lines.append(
                    f"| {seed} | {one.contestant} | {one.images_per_sec:.0f} | {one.cpu_ms_per_image:.2f} "
                    f"| {one.accuracy.knn:.1%} | {one.accuracy.linear:.1%} |"
                )
    summary = (
        f"{contest.epochs} epochs of {contest.num_images:,} images, batch {contest.batch_size}, {contest.cores} cores; "
        f"ours is {contest.speed_ratio:.2f} times as fast. Accuracy on {contest.num_test:,} test images."
    )
    return "\n".join([*lines, "", summary])


def draw_contest(contest: Contest, path: Path) -> None:
    """Images a second, and accuracy by seed, beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    speed, *accuracies = figure.subplots(1, 3)
    names = list(dict.fromkeys(one.contestant for one in contest.outcomes))
    for i, name in enumerate(names):
        mine = [one for one in contest.outcomes if one.contestant == name]
        rates = [one.images_per_sec for one in mine]
        speed.bar(i, sum(rates) / len(rates), width=0.6, color=COLORS[name])
        speed.plot([i] * len(rates), rates, "o", color="black", markersize=3)
        for axes, kind in zip(accuracies, ("knn", "linear"), strict=True):
            values = [100 * getattr(one.accuracy, kind) for one in mine]
            axes.plot([i + 1] * len(values), values, "o", color=COLORS[name], markersize=6)
    for axes, kind, title in zip(accuracies, ("knn", "linear"), ("kNN on h, %", "linear on h, %"), strict=True):
        values = [100 * getattr(accuracy, kind) for accuracy in contest.start.values()]
        axes.plot([0] * len(values), values, "o", color=COLORS["start"], markersize=6)
        axes.set_title(title)
        axes.set_xticks(range(len(names) + 1), ["start", *names])
        axes.set_xlim(-0.5, len(names) + 0.5)
        axes.grid(axis="y", alpha=0.3)
    speed.set_title(f"images/s on {contest.cores} cores ({contest.speed_ratio:.2f}×)")
    speed.set_xticks(range(len(names)), names)
    for axes in (speed, *accuracies):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
