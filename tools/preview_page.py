"""A contact sheet as one self-contained page: no network, no scripts, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from pipelines.recipe import Recipe
from tools.preview_sheet import Sheet, Shown, color_of, original_with_windows
from tools.preview_words import describe

ORIGINAL_SIDE = 400  # pixels, of the stored image with its windows

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --line: #d5dae3; --soft: #f4f6fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --paper: #14181f; --line: #333b49; --soft: #1c222c; } }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; font: 16px/1.45 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
h2 { font-size: 1.05rem; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.25rem; }
@media (max-width: 32rem) { .views { grid-template-columns: repeat(2, 1fr); gap: .75rem; } }
figure { margin: 0; }
img { width: 100%; max-width: 24rem; image-rendering: pixelated; }
figcaption b { display: block; margin-top: .25rem; }
figcaption i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid var(--ink); }
figcaption ul { margin: .25rem 0 0; padding-left: 1.1rem; font-size: .9rem; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
"""


def page(sheet: Sheet) -> str:
    """The page's HTML."""
    title = html.escape(sheet.title)
    sections = "".join(_section(image, sheet.recipe) for image in sheet.images)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style><body><main><h1>{title}</h1>"
        "<p>Each stored image with the windows of its views, and the views as the model sees them, before "
        "normalisation. What was done is listed in the order in which it was done.</p>"
        f"{sections}<section><h2>Augmentation</h2><pre>{html.escape(sheet.settings)}</pre></section></main></body></html>\n"
    )


def _section(image: Shown, recipe: Recipe) -> str:
    height, width = image.original.shape[:2]
    name = f"row {image.row}" + (f": {image.name}" if image.name else "")
    original = original_with_windows(image, ORIGINAL_SIDE)
    figures = [
        _figure(
            original, f"stored image, {name}, with the windows of its views", "stored image", [f"{width} × {height} px"]
        )
    ]
    for v, (view, pixels) in enumerate(zip(recipe.views, image.views, strict=True)):
        words = describe(image.params[v], view)
        swatch = f'<i style="background:{color_of(v)}"></i>'
        heading = f"{swatch}view {v + 1}, {view.size} px"
        figures.append(
            _figure(Image.fromarray(pixels), f"view {v + 1} of row {image.row}: {'; '.join(words)}", heading, words)
        )
    return f'<section><h2>{html.escape(name)}</h2><div class="views">{"".join(figures)}</div></section>'


def _figure(picture: Image.Image, alt: str, heading: str, words: list[str]) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    items = "".join(f"<li>{html.escape(_unbroken(phrase))}</li>" for phrase in words)
    caption = f"<figcaption><b>{heading}</b><ul>{items}</ul></figcaption>"
    return f'<figure><img alt="{html.escape(alt)}" src="{source}">{caption}</figure>'


def _unbroken(phrase: str) -> str:
    """Factors and places are not torn at the end of a line."""
    return phrase.replace(" ×", "\u00a0×").replace(", ", ",\u00a0")
