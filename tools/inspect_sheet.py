"""A contact sheet of a `.beton`: stored images side by side, with their rows, classes and sizes in words below."""

from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from pipelines.beton import Beton
from pipelines.manifest import Manifest
from tools.image_decoding import ImageArray, UnusableImage
from tools.inspect_facts import row_facts
from tools.verify_samples import sample_pixels

PAPER, INK, FAINT, FRAME, VOID = "#ffffff", "#1d2433", "#667085", "#d5dae3", "#f2d6d3"
CELL, GAP, MARGIN, LINE = 176, 14, 24, 17  # pixels
NUM_COLUMNS = 6
NUM_LINES = 3  # of words below an image


def draw_sheet(beton: Beton, manifest: Manifest | None, rows: Sequence[int], title: str) -> Image.Image:
    """The sheet, RGB; a sample that cannot be decoded says so in its place."""
    num_lines = -(-len(rows) // NUM_COLUMNS)
    num_columns = min(NUM_COLUMNS, max(len(rows), 3))
    width = 2 * MARGIN + num_columns * (CELL + GAP) - GAP
    height = 2 * MARGIN + 2 * LINE + num_lines * (CELL + NUM_LINES * LINE + 2 * GAP)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    text, bold = _font("normal"), _font("bold")
    draw.text((MARGIN, MARGIN), _shortened(title, bold, width - 2 * MARGIN), INK, bold)
    for place, row in enumerate(rows):
        x = MARGIN + place % NUM_COLUMNS * (CELL + GAP)
        y = MARGIN + 2 * LINE + place // NUM_COLUMNS * (CELL + NUM_LINES * LINE + 2 * GAP)
        facts = row_facts(beton, manifest, row)
        problem = _draw_image(page, beton, row, x, y)
        label = "no label" if facts["label"] is None else f"{facts['label']} {facts['class'] or ''}".strip()
        size = problem or f"{facts['width']}×{facts['height']} {facts['mode']}, {facts['bytes'] / 1000:.1f} kB"
        name = f"row {row}  {(facts['name'] or '').split('/')[-1]}".strip()
        for i, (words, color, font) in enumerate(((label, INK, bold), (name, INK, text), (size, FAINT, text))):
            draw.text((x, y + CELL + 6 + i * LINE), _shortened(words, font, CELL), color, font)
    return page


def _draw_image(page: Image.Image, beton: Beton, row: int, x: int, y: int) -> str | None:
    """Pastes a sample; what is wrong with it if it cannot be decoded."""
    try:
        pixels = sample_pixels(beton, row, beton.encoded(row).tobytes())
    except UnusableImage as unusable:
        page.paste(VOID, (x, y, x + CELL, y + CELL))
        return str(unusable)
    picture = _fitted(pixels)
    left, top = x + (CELL - picture.width) // 2, y + CELL - picture.height
    frame = (left - 1, top - 1, left + picture.width, top + picture.height)
    ImageDraw.Draw(page).rectangle(frame, outline=FRAME)
    page.paste(picture, (left, top))
    return None


def _fitted(pixels: ImageArray) -> Image.Image:
    """Shrunk into a cell, or enlarged by a whole factor without smoothing."""
    picture, longest = Image.fromarray(np.ascontiguousarray(pixels)), max(pixels.shape[:2])
    if longest > CELL:
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        return picture
    factor = CELL // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = "".join(char if char.isprintable() else "�" for char in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(weight: str) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along and which knows × and …."""
    found = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(found, 12)
