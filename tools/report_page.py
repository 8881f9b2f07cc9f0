"""What the page of a report is put together from: escaped words, tables, sections, and the frame about them.

The page loads nothing: its policy allows its own style sheet, by digest, and images that it holds itself. It runs no
script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.report_style import style_sheet

JPEG_FROM = 72  # pixels of a side; smaller images keep every pixel, as PNG
TILE = 112  # pixels: larger ones are reduced to it


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    key: str
    """A word that tells it from its neighbours, for links."""
    title: str
    body: str = ""
    """HTML."""
    parts: list[Section] = field(default_factory=list)


def text(value: object) -> str:
    """Anything as HTML text that neither ends an attribute nor moves what stands about it."""
    shown = "".join(char if char.isprintable() or char in "\n\u00a0" else "\ufffd" for char in str(value))
    return html.escape(shown, quote=True)


def paragraph(words: str) -> str:
    """Plain words."""
    return f"<p>{text(words)}</p>"


def missing(words: str, command: str = "") -> str:
    """What is not there, and the command that would make it."""
    return f'<div class="missing"><p>{text(words)}</p>{code(command) if command else ""}</div>'


def code(command: str) -> str:
    """A command or a file, as it is."""
    return f"<pre><code>{text(command)}</code></pre>"


def table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """Words as a table, the first of each row being its heading; scrolled by itself where it is wide.

    Args:
        caption: what it shows.
        titles: of the columns.
        rows: plain words.
        kind: `words` where the cells are sentences, not numbers.
    """
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in titles)
    lines = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table{name}>'
        f"<caption><span>{text(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def figures(pairs: Sequence[tuple[str, str, str]]) -> str:
    """Names, figures and a few words to each, as a row of tiles."""
    tiles = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in pairs
    )
    return f'<dl class="figures">{tiles}</dl>'


def details(summary: str, body: str) -> str:
    """What is opened when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def picture(pixels: NDArray[np.uint8], alt: str) -> str:
    """An image [H, W, 3] inside the page: small ones as they are, large ones reduced."""
    image = Image.fromarray(pixels)
    is_small = max(image.size) <= JPEG_FROM
    if not is_small:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 85}))
    source = f"data:image/{'png' if is_small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{"" if is_small else " class=smooth"} {size} alt="{text(alt)}" src="{source}">'


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    links = "".join(f'<li><a href="#{_id(section.key)}">{text(section.title)}</a></li>' for section in sections)
    body = "".join(_section(section, 2, "") for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title><style>{style}</style></head>\n'
        '<body><a class="skip" href="#main">Skip to the content</a>'
        f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main id="main">{body}</main>\n'
        "<footer><p>Written by <code>python -m tools.report</code>. Images per second count source images, not views."
        "</p></footer></body></html>\n"
    )


def _section(section: Section, level: int, inside: str) -> str:
    key = f"{inside}{_id(section.key)}"
    parts = "".join(_section(part, level + 1, f"{key}-") for part in section.parts)
    heading = f'<h{level} id="{key}">{text(section.title)}</h{level}>'
    return f'<section aria-labelledby="{key}">{heading}{section.body}{parts}</section>\n'


def _id(key: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in key)
