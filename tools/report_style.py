"""The looks of a report: colours for light and dark, and rules, as one style sheet.

Colours are variables, once for each theme, and figures use them too. Text has a contrast of at least 4.5 against what
it stands on, lines and marks of 3 (WCAG 2.2, AA); a test computes both.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1d2433",
    "muted": "#525c6f",
    "link": "#0b57a4",
    "paper": "#ffffff",
    "soft": "#f2f4f8",
    "line": "#d5dae3",
    "edge": "#717b8e",
    "s0": "#0067a3",
    "s1": "#b84a00",
    "s2": "#007a5a",
    "s3": "#a3478a",
    "s4": "#7a5a1e",
    "s5": "#5b5bd6",
    "s6": "#333b49",
    "s7": "#c2255c",
}
DARK = {
    "ink": "#e6e9f0",
    "muted": "#a9b3c3",
    "link": "#86bdff",
    "paper": "#14181f",
    "soft": "#1d232d",
    "line": "#333b49",
    "edge": "#7d8899",
    "s0": "#56b4e9",
    "s1": "#f2a25c",
    "s2": "#3ecb9f",
    "s3": "#e7a3cd",
    "s4": "#d3b969",
    "s5": "#a9a9ff",
    "s6": "#ccd2dc",
    "s7": "#ff93ab",
}
NUM_COLORS = 8
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
"""Of lines, in turn with the colours: nothing is told apart by colour alone."""

RULES = """
* { box-sizing: border-box; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  overflow-wrap: anywhere; }
header, nav, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; padding-bottom: .25rem; font-size: 1.3rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.08rem; }
h4 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; padding: .5rem 1rem; background: var(--paper); }
.skip:focus { left: .5rem; top: .5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: .75rem 0 0; padding: 0; list-style: none; }
footer { margin-top: 3rem; padding-bottom: 2rem; color: var(--muted); font-size: .9rem; }
.muted, figcaption, caption { color: var(--muted); }
.missing { margin: .5rem 0; padding: .4rem .9rem; background: var(--soft); border-left: 4px solid var(--edge); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0;
  padding: 0; }
.figures div { padding: .7rem .75rem; background: var(--soft); border-radius: 6px; }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.1rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dd small { display: block; color: var(--muted); font-size: .8rem; font-weight: 400; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .95rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; text-align: left; font-size: .9rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(100vw - 2.75rem, 60rem); }
th, td { max-width: 22rem; padding: .3rem .8rem .3rem 0; overflow-wrap: break-word;
  border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; unicode-bidi: isolate; }
th { font-weight: 600; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
td { white-space: nowrap; }
.words td, .last td:last-child { white-space: normal; }
.last td:last-child { min-width: 16rem; text-align: left; }
tbody th { min-width: 8rem; font-weight: 400; }
thead th { vertical-align: bottom; }
.scroll { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem 1.25rem; }
.curves > * { min-width: 0; }
figure { margin: 0; }
figcaption { font-size: .88rem; }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--edge); stroke-width: 1; fill: none; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.pause { fill: var(--line); }
.mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
.run { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.span { stroke: none; opacity: .22; }
.hit { fill: transparent; }
.hit:hover { fill: currentColor; }
.key { display: inline-block; width: 2.2rem; height: .7rem; margin-right: .4rem; vertical-align: baseline; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0 1rem; padding: 0; list-style: none; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--link); }
pre { margin: .5rem 0; padding: .7rem .9rem; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  font-size: .85rem; line-height: 1.45; white-space: pre-wrap; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; background: var(--soft); }
img.smooth { image-rendering: auto; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .9rem .75rem;
  margin: 1rem 0; padding: 0; list-style: none; font-size: .85rem; }
.sheet .views { display: grid; grid-template-columns: repeat(2, 1fr); gap: 3px; }
.sheet .one { grid-template-columns: 1fr; }
.gallery { display: grid; gap: 1rem; margin: 1rem 0; padding: 0; list-style: none; }
.gallery ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.4rem, 1fr)); gap: .5rem; margin: 0;
  padding: 0; list-style: none; font-size: .78rem; line-height: 1.3; }
.gallery li li { border: 2px solid var(--line); padding: 2px; }
.gallery .query { border-color: var(--ink); }
.gallery .right { border-color: var(--s0); }
.gallery .wrong { border: 2px dashed var(--s1); }
.maps { max-width: 40rem; }
.dot { opacity: .8; }
@media (max-width: 30rem) { header, nav, main, footer { padding-left: .75rem; padding-right: .75rem; }
  h1 { font-size: 1.4rem; } }
@media print { nav, .skip { display: none; } details > * { display: block; } }
"""


def style_sheet() -> str:
    """All of it."""
    light, dark = (_variables(theme) for theme in (LIGHT, DARK))
    series = "".join(
        f".c{i} {{ stroke: var(--s{i}); color: var(--s{i}); }} .f{i} {{ fill: var(--s{i}); color: var(--s{i}); }}\n"
        for i in range(NUM_COLORS)
    )
    dashes = "".join(f".d{i} {{ stroke-dasharray: {dash}; }}\n" for i, dash in enumerate(DASHES))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{series}{dashes}{RULES}"
    )


def _variables(theme: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in theme.items())
