"""A contact sheet as a picture: each image with the windows of its views drawn on it, then the views, in words below.

Views keep their own pixels: small ones are enlarged by a whole factor, without smoothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.params import ViewParams
from pipelines.recipe import Recipe
from tools.preview_words import describe

PAPER, INK, FAINT = "#ffffff", "#1d2433", "#667085"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8250df", "#8c6d31", "#f0e442", "#808080")
"""One a view: Okabe and Ito's, told apart by color-blind eyes, and three more."""
MIN_CELL, MAX_CELL = 224, 384  # side of the square that a picture is fitted into, pixels
MAX_COLUMNS = 6
MARGIN, GAP = 24, 16
LINE = 18  # pixels from one line of text to the next


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image and its views."""

    row: int
    """Of the set."""
    name: str
    original: NDArray[np.uint8]
    """[H, W, 3]."""
    params: ViewParams
    """`VIEW_PARAMS` [V]."""
    views: list[NDArray[np.uint8]]
    """V × [S, S, 3], as the model sees them but for the normalisation."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What is shown."""

    title: str
    recipe: Recipe
    images: list[Shown]
    settings: str = ""
    """The augmentation's configuration, YAML."""


@dataclass
class _Cell:
    """A picture and what is written below it."""

    picture: Image.Image
    color: str | None
    heading: str
    words: list[str] = field(default_factory=list)


def color_of(view: int) -> str:
    """The color of a view's window and heading."""
    return COLORS[view % len(COLORS)]


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The whole sheet, RGB."""
    cell = min(max(MIN_CELL, *(view.size for view in sheet.recipe.views)), MAX_CELL)
    text, bold = _font(13), _font(13, "bold")
    blocks = [(image, _wrapped(_cells(image, sheet.recipe, cell), cell, text)) for image in sheet.images]
    num_columns = min(1 + len(sheet.recipe.views), MAX_COLUMNS)
    width = 2 * MARGIN + num_columns * (cell + GAP) - GAP
    height = 2 * MARGIN + 2 * LINE
    height += sum(2 * LINE + sum(cell + _caption_height(line) for line in _lines(cells)) for _, cells in blocks)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), sheet.title, INK, _font(16, "bold"))
    y = MARGIN + 2 * LINE
    for image, cells in blocks:
        draw.line((MARGIN, y, width - MARGIN, y), "#d5dae3")
        draw.text((MARGIN, y + 6), f"row {image.row}", INK, bold)
        draw.text((MARGIN + 80, y + 6), image.name, FAINT, text)
        y += 2 * LINE
        for line in _lines(cells):
            for column, one in enumerate(line):
                _draw_cell(page, one, MARGIN + column * (cell + GAP), y, cell)
            y += cell + _caption_height(line)
    return page


def original_with_windows(image: Shown, side: int) -> Image.Image:
    """The stored image, fitted into a square of `side` pixels, with a rectangle a view."""
    height, width = image.original.shape[:2]
    scale = side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image.original).resize(size, Image.Resampling.NEAREST if scale > 1 else None)
    draw = ImageDraw.Draw(picture)
    drawn: list[tuple[int, ...]] = []
    for v, p in enumerate(image.params):
        window = tuple(int(p[name]) for name in ("left", "top", "width", "height"))
        inset = 4 * drawn.count(window)  # equal windows lie inside one another
        drawn.append(window)
        left, top = window[0] * scale + inset, window[1] * scale + inset
        right, bottom = (window[0] + window[2]) * scale - 1 - inset, (window[1] + window[3]) * scale - 1 - inset
        box = (left, top, max(left, right), max(top, bottom))
        draw.rectangle(box, outline="#000000", width=4)
        draw.rectangle(box, outline=color_of(v), width=3)
    return picture


def _cells(image: Shown, recipe: Recipe, cell: int) -> list[_Cell]:
    height, width = image.original.shape[:2]
    cells = [_Cell(original_with_windows(image, cell), None, "stored image", [f"{width} × {height} px"])]
    for v, (view, pixels) in enumerate(zip(recipe.views, image.views, strict=True)):
        heading = f"view {v + 1}, {view.size} px"
        cells.append(_Cell(_fitted(pixels, cell), color_of(v), heading, describe(image.params[v], view)))
    return cells


def _fitted(pixels: NDArray[np.uint8], cell: int) -> Image.Image:
    picture, side = Image.fromarray(pixels), pixels.shape[0]
    if side > cell:
        return picture.resize((cell, cell), Image.Resampling.LANCZOS)
    side *= cell // side
    return picture.resize((side, side), Image.Resampling.NEAREST)


def _wrapped(cells: list[_Cell], cell: int, font: ImageFont.FreeTypeFont) -> list[_Cell]:
    """Words broken into lines of a cell's width."""
    for one in cells:
        lines: list[str] = []
        for phrase in one.words:
            line = ""
            for word in re.split(r" (?![×→])", phrase):  # a factor and an arrow stay with what stands before
                longer = f"{line} {word}" if line else word
                if line and font.getlength(longer) > cell:
                    lines.append(line)
                    longer = f"   {word}"
                line = longer
            lines.append(line)
        one.words = lines
    return cells


def _lines(cells: list[_Cell]) -> list[list[_Cell]]:
    return [cells[i : i + MAX_COLUMNS] for i in range(0, len(cells), MAX_COLUMNS)]


def _caption_height(line: list[_Cell]) -> int:
    return (1 + max(len(one.words) for one in line)) * LINE + 2 * GAP


def _draw_cell(page: Image.Image, one: _Cell, x: int, y: int, cell: int) -> None:
    page.paste(one.picture, (x, y + cell - one.picture.height))
    draw = ImageDraw.Draw(page)
    y += cell + 6
    indent = 0
    if one.color:
        draw.rectangle((x, y + 2, x + 12, y + 14), one.color, "#000000")
        indent = 20
    draw.text((x + indent, y), one.heading, INK, _font(13, "bold"))
    for i, words in enumerate(one.words):
        draw.text((x, y + (i + 1) * LINE), words, INK, _font(13))


def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along and which knows σ, × and →."""
    found = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(found, size)
