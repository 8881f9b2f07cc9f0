"""What a run learned, looked at: a map of representations, and images with those nearest to them.

On a sample of the test set where one is known, else of the training set; with classes where there are labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import numpy as np

from pipelines.batch import MissingPackage
from tools.pictures_canvas import MARKERS, shortened
from tools.pictures_embedding import EmbeddingConfig, lay_out
from tools.pictures_neighbours import choose_queries, nearest_others
from tools.pictures_source import MAX_CLASSES, shown_classes
from tools.report_accuracy import Record
from tools.report_numbers import percent
from tools.report_page import Section, missing, paragraph, picture, text
from tools.report_runs import RunRecord
from tools.report_sample import Sample, draw_sample
from tools.report_series import FloatArray
from tools.report_style import NUM_COLORS
from train.cli import UnfitEnvironment

FEWEST = 8  # images of which a map or neighbours say anything
NUM_QUERIES, NUM_NEIGHBOURS = 8, 7
PERPLEXITY = 30.0
SIDE, MARGIN = 400, 8  # of the map
MOST_LETTERS = 24


def look(run: RunRecord, records: Sequence[Record], test_data: str | None) -> list[Section]:
    """The map and the gallery of a run; why there are none, where there are none.

    Args:
        run: with a checkpoint, if it has one.
        records: its evaluations, whose test set is taken where none is given.
        test_data: the set to look at.
    """
    body = ""
    if run.checkpoint is None:
        body = missing("There is no checkpoint yet, and so nothing learned to look at.")
    elif (path := choose_data(run, records, test_data)) is None:
        body = missing(
            "Neither the test set of an evaluation nor the training set is here. On any images:",
            f"python -m tools.report {quote(str(run.path))} --test_data data/test.beton",
        )
    else:
        try:
            sample = draw_sample(run.checkpoint, path)
        except (ValueError, OSError, MissingPackage, UnfitEnvironment) as error:
            body = missing(f"{path} cannot be looked at: {' '.join(str(error).split())}")
        else:
            if len(sample.rows) >= FEWEST:
                which = "training images" if path == run.stored.get("data.path") else "images"
                about = f"{len(sample.rows):,} {which} of {path}, chosen by chance; encoder of step {run.saved_step:,}."
                return [
                    Section(key="map", title="Map of representations", body=embedding_map(sample, about)),
                    Section(key="neighbours", title="Nearest neighbours", body=gallery(sample, about)),
                ]
            body = missing(f"{path} has {len(sample.rows)} images: too few to compare. Name others by --test_data.")
    return [Section(key="map", title="Map and neighbours", body=body)]


def choose_data(run: RunRecord, records: Sequence[Record], test_data: str | None) -> str | None:
    """The set that is given, or that an evaluation was on, or that was trained on; the first that is here."""
    if test_data is not None:
        return test_data
    known = [record["test_data"] for record in records] + [run.stored.get("data.path")]
    return next((path for path in known if isinstance(path, str) and path and Path(path).exists()), None)


def embedding_map(sample: Sample, about: str) -> str:
    """The plane that t-SNE makes of h, each class with a mark of its own."""
    classes = shown_classes(sample.labels, (), _names(sample)) if sample.is_labelled else []
    rows = np.flatnonzero(np.isin(sample.labels, classes)) if classes else np.arange(len(sample.rows))
    if len(rows) < FEWEST:
        rows, classes = np.arange(len(sample.rows)), []
    labels = sample.labels[rows] if classes else np.zeros(len(rows), np.int64)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    config = EmbeddingConfig(checkpoint="", test_data="", perplexity=perplexity)
    points = _into_field(lay_out(sample.values[rows].numpy(), config).points)
    marks, legend = [], []
    for i, label in enumerate(classes or [0]):
        of_class = points[labels == label]
        name = sample.name(label) if classes else "all images"
        shape = "".join(_mark(i, x, y, 3.4) for x, y in of_class)
        title = f"{name}: {len(of_class)} images"
        marks.append(f'<path class="dot f{i % NUM_COLORS}" d="{shape}"><title>{text(title)}</title></path>')
        sign = f'<path class="f{i % NUM_COLORS}" d="{_mark(i, 18, 5, 5)}"/>'
        key = f'<svg class="key" viewBox="0 0 36 10" aria-hidden="true">{sign}</svg>'
        legend.append(f"<li>{key}{text(shortened(name, MOST_LETTERS))}</li>")
    some = f" {len(classes)} of its classes." if classes and len(classes) == MAX_CLASSES else ""
    coloured = "a class" if classes else "a mark an image, without labels"
    said = (
        f"{about}{some} t-SNE (perplexity {perplexity:.3g}) of h, the encoder's output, scaled to length 1: it keeps "
        "neighbours together; distances between groups, and their sizes, mean little."
    )
    drawing = (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="Map of {len(rows)} images by {coloured}">'
        f'<path class="axis" d="M.5 .5H{SIDE - 0.5}V{SIDE - 0.5}H.5Z"/>{"".join(marks)}</svg>'
    )
    keys = f'<ul class="legend" aria-label="Classes">{"".join(legend)}</ul>' if classes else ""
    return f'{paragraph(said)}{keys}<figure class="maps">{drawing}</figure>'


def _into_field(points: FloatArray) -> FloatArray:
    """Scaled into the drawing, both axes alike."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = float((high - low).max()) or 1.0
    offset = (span - (high - low)) / 2
    placed: FloatArray = MARGIN + (points - low + offset) / span * (SIDE - 2 * MARGIN)
    return placed


def _mark(number: int, x: float, y: float, size: float) -> str:
    """A circle, a triangle or a square about a place, in turn with the colours."""
    kind = MARKERS[number % len(MARKERS)]
    if kind == "o":
        return f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    if kind == "^":
        return f"M{x:.1f} {y - 1.2 * size:.1f}l{1.2 * size:.1f} {2.1 * size:.1f}h{-2.4 * size:.1f}z"
    return f"M{x - 0.9 * size:.1f} {y - 0.9 * size:.1f}h{1.8 * size:.1f}v{1.8 * size:.1f}h{-1.8 * size:.1f}z"


def gallery(sample: Sample, about: str) -> str:
    """Images drawn by chance, and those of the sample that are nearest to each."""
    num_queries, k = min(NUM_QUERIES, len(sample.rows)), min(NUM_NEIGHBOURS, len(sample.rows) - 1)
    queries = choose_queries(sample.labels, num_queries, seed=0)
    neighbours, cosines = nearest_others(sample.values, queries, k)
    shown = sample.images([*queries.tolist(), *neighbours.flatten().tolist()])
    rows = []
    for query, near, cosine in zip(queries.tolist(), neighbours.tolist(), cosines.tolist(), strict=True):
        label = int(sample.labels[query])
        file = sample.file(query)
        name, short = (sample.name(label),) * 2 if sample.is_labelled else (file, file.rpartition("/")[2])
        image = picture(shown[query], f"query, {name}")
        first = f'<li class="query" title="{text(file)}">{image}{text(shortened(short, MOST_LETTERS))}</li>'
        others = "".join(
            _neighbour(sample, shown[other], other, label, value) for other, value in zip(near, cosine, strict=True)
        )
        rows.append(f"<li><ol>{first}{others}</ol></li>")
    said = f"{about} First in each row an image drawn by chance, then those nearest to it by cosine of h."
    if sample.is_labelled:
        right = float((sample.labels[neighbours] == sample.labels[queries][:, None]).mean())
        said += f" {percent(right)} of the neighbours shown are of its class (✓); others are named (✗)."
    return f'{paragraph(said)}<ol class="gallery">{"".join(rows)}</ol>'


def _neighbour(sample: Sample, pixels: np.ndarray, other: int, label: int, cosine: float) -> str:
    file = sample.file(other)
    if not sample.is_labelled:
        return f'<li title="{text(file)}">{picture(pixels, f"neighbour, {file}")}{cosine:.2f}</li>'
    theirs = int(sample.labels[other])
    kind, sign = ("right", "✓") if theirs == label else ("wrong", "✗")
    name = sample.name(theirs)
    word = sign if kind == "right" else f"{sign} {text(shortened(name, MOST_LETTERS))}"
    return f'<li class="{kind}" title="{text(file)}">{picture(pixels, f"neighbour, {name}")}{word} {cosine:.2f}</li>'


def _names(sample: Sample) -> list[str]:
    return [sample.name(label) for label in range(int(sample.labels.max()) + 1)]
