"""A plan as a picture: images a second, where the seconds of a step go, and memory, each against the number of GPUs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.pictures_canvas import COLORS, STYLE, new_figure
from tools.plan_model import Plan, Reason
from tools.plan_scaling import Limit, Row
from tools.plan_table import encoder_words, in_words_of, num_gpus
from tools.preview_sheet import FAINT

PARTS: dict[Reason, str] = {
    "compute": "computing",
    "batch": "fixed costs of a step",
    "optimizer": "optimizer",
    "loss": "loss",
    "network": "gradients and projections",
    "latency": "small all-reduces",
    "loading": "waiting for the loader",
    "storage": "waiting for storage",
}
LEAST = 0.005  # of a step: what is less has no place in the legend


def draw_plan(plan: Plan, rows: Sequence[Row], limit: Limit) -> bytes:
    """The PNG's bytes."""
    with mpl.rc_context(STYLE):
        encoder, profile = plan.run.model.encoder, plan.profile
        words = partial(in_words_of, profile.device)
        figure = new_figure(
            13.0,
            4.6,
            words(f"{encoder_words(encoder)} at {plan.run.augment.size}²: scales to {num_gpus(limit.gpus)}"),
            words(
                f"predicted from {profile.together_images_per_sec:,.4g} images/s on {profile.world_size} × "
                f"{profile.device_name}; {'batch a GPU' if plan.weak else 'global batch'} {plan.global_batch_size(1)}"
            ),
        )
        rates, parts, memory = figure.subplots(1, 3)
        _draw_rates(rates, plan, rows)
        _draw_parts(parts, plan, rows)
        _draw_memory(memory, plan, rows)
        return _png(figure)


def _draw_rates(panel: Axes, plan: Plan, rows: Sequence[Row]) -> None:
    gpus = [row.step.gpus for row in rows]
    alone = plan.step(1).images_per_sec
    panel.plot(gpus, [number * alone for number in gpus], "--", color=FAINT, label="n times one")
    panel.plot(gpus, [row.step.images_per_sec for row in rows], "-o", color=COLORS[0], label="predicted")
    if plan.is_as_measured:
        where, rate = [plan.profile.world_size], [plan.profile.together_images_per_sec]
        panel.plot(where, rate, "o", markersize=13, markerfacecolor="none", color=COLORS[4], label="measured")
    for row in rows:
        point = (row.step.gpus, row.step.images_per_sec)
        panel.annotate(f"{row.efficiency:.0%}", point, (0, -14), textcoords="offset points", ha="center", fontsize=8)
    panel.margins(y=0.12)
    panel.set(title="images/s, and efficiency", xlabel=_axis(plan), xscale="log", yscale="log")
    _label_gpus(panel, gpus)
    panel.legend(loc="upper left")


def _draw_parts(panel: Axes, plan: Plan, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    below = [0.0] * len(rows)
    for i, (name, words) in enumerate(PARTS.items()):
        shares = [row.step.parts.get(name, 0.0) / row.step.seconds for row in rows]
        if max(shares) < LEAST:
            continue
        panel.bar(places, shares, bottom=below, color=COLORS[i], label=words, width=0.75, edgecolor="white")
        below = [low + share for low, share in zip(below, shares, strict=True)]
    panel.set(title="where a step's time goes", xlabel=_axis(plan), ylabel="share", ylim=(0, 1))
    panel.set_xticks(list(places), [str(row.step.gpus) for row in rows])
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)


def _draw_memory(panel: Axes, plan: Plan, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    layers = (
        ("parameters, gradients, momentum", [row.step.memory.states for row in rows]),
        (
            "activations, or gradients on their way",
            [max(row.step.memory.computing, row.step.memory.reducing) for row in rows],
        ),
        ("what does not depend on the plan", [row.step.memory.rest for row in rows]),
    )
    below = [0.0] * len(rows)
    for i, (words, sizes) in enumerate(layers):
        panel.bar(places, [size / 1e9 for size in sizes], bottom=below, color=COLORS[i], label=words, edgecolor="white")
        below = [low + size / 1e9 for low, size in zip(below, sizes, strict=True)]
    if plan.config.gpu_memory_gb is not None:
        panel.axhline(plan.config.gpu_memory_gb, color=COLORS[4], linestyle="--", label="what each has")
    panel.set(title="memory of each, GB", xlabel=_axis(plan))
    panel.set_xticks(list(places), [str(row.step.gpus) for row in rows])
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)


def _axis(plan: Plan) -> str:
    return in_words_of(plan.profile.device, "GPUs")


def _label_gpus(panel: Axes, gpus: Sequence[int]) -> None:
    panel.set_xticks(list(gpus), [str(number) for number in gpus])
    panel.minorticks_off()


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
