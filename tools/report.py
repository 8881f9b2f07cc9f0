"""A run as one self-contained page: `python -m tools.report runs/NAME` writes `runs/NAME/report.html`.

Curves, throughput, what the model saw, evaluation, configuration and versions; no network, no scripts.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pipelines.augment import build_recipe
from pipelines.build import build_loader, open_data
from pipelines.recipe import Recipe
from tools.report_accuracy import accuracy_tables
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.cli import run
from train.config import CONFIG_FILE, PretrainConfig, config_from_dict, read_run_config
from train.metrics import read_metrics
from train.schedule import size_of_epoch

NUM_SHOWN = 12  # images on the contact sheet
CURVES = {
    "loss": "NT-Xent loss",
    "contrastive_accuracy": "contrastive accuracy",
    "probe_accuracy": "accuracy of the online probe",
    "knn_accuracy": "accuracy of nearest neighbours",
    "representation_std": "spread of the representations",
    "projection_rank": "rank of the projections",
    "images_per_sec": "source images a second",
    "data_wait": "share of time waiting for data",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --line: #d5dae3; --soft: #f4f6fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --paper: #14181f; --line: #333b49; --soft: #1c222c; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; }
td:not(:first-child) { white-space: nowrap; }
.scroll { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; background: #fff; border-radius: 4px; }
.sheet img { width: 100%; image-rendering: pixelated; background: none; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
"""


def write_report(run_dir: Path) -> Path:
    """Write the report of a run.

    Returns:
        Its path.

    Raises:
        ValueError: the directory holds no run.
    """
    config = config_from_dict(read_run_config(run_dir))
    sections = [
        _section("Accuracy", accuracy_tables(run_dir / "evaluation")),
        _section("Training", _curves(run_dir)),
        _section("What the model sees", _contact_sheet(config)),
        _section("Environment", _versions(run_dir)),
        _section("Configuration", f"<pre>{html.escape((run_dir / CONFIG_FILE).read_text())}</pre>"),
    ]
    title = html.escape(config.name)
    command = html.escape(f"deepspeed train/pretrain.py --config {run_dir / CONFIG_FILE} --name {config.name}-again")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style><body><h1>{title}</h1><p>Train it again:</p>"
        f"<pre>{command}</pre>{''.join(sections)}</body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page)
    return path


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _curves(run_dir: Path) -> str:
    lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    if not lines:
        return "<p>No metrics yet.</p>"
    return '<div class="curves">' + "".join(_curve(lines, name) for name in CURVES) + "</div>"


def _curve(lines: list[dict[str, float]], name: str) -> str:
    """One metric over the lines that have it; nothing where none does."""
    lines = [line for line in lines if name in line]
    if not lines:
        return ""
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], color="#2b6cb0")
        axes.set(xlabel="step", title=CURVES[name])
        if name != "loss":
            axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    last = f"{CURVES[name]} by step, ending at {lines[-1][name]:.4g}"
    return f'<figure><img alt="{last}" src="data:image/svg+xml;base64,{_base64(file)}"></figure>'


def _contact_sheet(config: PretrainConfig) -> str:
    """The views of the first images of epoch 0: a column an image, a row a view."""
    if not Path(config.data.path).exists():
        return f"<p>{html.escape(config.data.path)} is not here.</p>"
    data_config = dataclasses.replace(
        config.data,
        loader="folder" if config.data.loader == "folder" else "ffcv",
        photometric="ours",
        geometry="auto",
        num_threads=1,
        on_error="skip",
    )
    data = open_data(data_config)
    side = size_of_epoch(config.schedule, 0, config.augment.size)
    recipe = build_recipe(dataclasses.replace(config.augment, size=side))
    loader = build_loader(
        dataclasses.replace(data_config, global_batch_size=min(NUM_SHOWN, data.num_samples)),
        data,
        Recipe(views=recipe.views),  # without the normalisation: as pictures
        seed=config.seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_cores=1,
    )
    try:
        batch = next(iter(loader.epoch(0)))
    finally:
        loader.close()
    rows = "".join(_row_of_images(view, f"view {v} of {batch.num_images} images") for v, view in enumerate(batch.views))
    return (
        f'<figure class="sheet">{rows}<figcaption>A column an image, a row a view, as in epoch 0.</figcaption></figure>'
    )


def _row_of_images(view: Tensor, text: str) -> str:
    levels = (view.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(levels), axis=1)).save(file, "PNG")
    return f'<img alt="{text}" src="data:image/png;base64,{_base64(file)}">'


def _versions(run_dir: Path) -> str:
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return ""
    versions: dict[str, Any] = load_checkpoint(checkpoint).versions
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in versions.items())
    return f'<div class="scroll"><table>{rows}</table></div>'


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description="A run as one self-contained page.")
    parser.add_argument("run", type=Path, help="the run's directory")
    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    run(main)
