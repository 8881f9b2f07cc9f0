"""Shows what is in a `.beton`, or in a set in shards: tables, sizes, classes, quarantine, and the images.

    python -m tools.inspect_beton train.beton [--json facts.json] [--sheet sheet.png] [--rows 0:10]

Files that FFCV wrote are read as well; they have no manifest, so no names. What is damaged is said in one line. To
prove a file whole, use `tools.verify`.

Exit codes: 0 shown; 2 no such file, or a damaged one.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from pipelines.beton import Beton, open_beton
from pipelines.manifest import Manifest, ManifestError, load_manifest
from tools.convert_places import human
from tools.image_decoding import codec_settings
from tools.inspect_facts import inspect, row_facts
from tools.inspect_sheet import draw_sheet
from tools.inspect_text import rows_table, summary
from tools.whole_file import whole_file
from train.cli import run

SHEET_ROWS = 30
MAX_SHEET_ROWS = 600


def parse_rows(text: str, num_samples: int) -> range:
    """The rows of `5`, `0:10`, `90:` or `:10`.

    Raises:
        ValueError: it is none of these, or names no row.
    """
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text.strip())
    if match is None or not (match[1] or match[2]):
        raise ValueError(f"--rows must be as in 0:10, got {text!r}")
    begin = int(match[1] or 0)
    end = int(match[3] or num_samples) if match[2] else begin + 1
    rows = range(begin, min(end, num_samples))
    if not rows:
        raise ValueError(f"--rows must name some of the rows 0 to {num_samples - 1}, got {text!r}")
    return rows


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    beton = open_beton(args.beton)
    manifest, problem = _manifest(args.beton, beton)
    rows = None if args.rows is None else parse_rows(args.rows, beton.num_samples)
    if args.sheet and args.sheet.suffix != ".png":
        raise ValueError(f"--sheet must name a .png, got {args.sheet}")
    with codec_settings():
        facts = inspect(beton, manifest)
        print("\n".join(summary(facts, problem)))
        if rows is not None:
            facts["rows"] = [row_facts(beton, manifest, row) for row in rows]
            print("\n" + "\n".join(rows_table(facts["rows"])))
        if args.sheet:
            _write_sheet(args.sheet, beton, manifest, rows)
    if args.json:
        facts["manifest_problem"] = problem
        with whole_file(args.json) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
    return 0


def _manifest(path: Path, beton: Beton) -> tuple[Manifest | None, str | None]:
    """The manifest, or what is wrong with it."""
    try:
        manifest = load_manifest(path)
    except ManifestError as error:
        return None, str(error)
    if manifest is not None and manifest.num_samples != beton.num_samples:
        return None, f"it is of {manifest.num_samples} samples, the file of {beton.num_samples}"
    return manifest, None


def _write_sheet(path: Path, beton: Beton, manifest: Manifest | None, rows: range | None) -> None:
    shown = list(rows) if rows is not None else np.linspace(0, beton.num_samples - 1, SHEET_ROWS).astype(int).tolist()
    shown = sorted(set(shown))
    if len(shown) > MAX_SHEET_ROWS:
        raise ValueError(f"a sheet shows {MAX_SHEET_ROWS} rows at most, got {len(shown)}; name fewer in --rows")
    which = f"rows {shown[0]} to {shown[-1]}" if rows is not None else f"{len(shown)} rows, spread evenly"
    num_bytes = sum(stamp.num_bytes for stamp in beton.stamps)
    title = f"{beton.path.name}: {beton.num_samples} images, {human(num_bytes)}; {which}"
    picture = draw_sheet(beton, manifest, shown, title)
    with whole_file(path) as file:
        picture.save(file, "PNG")
    print(f"\n{path}: {which}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_beton",
        description="Show what is in a .beton, or in a set in shards.",
    )
    parser.add_argument("beton", type=Path, help="the .beton file, or the .shards.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that is shown as JSON")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write the images as a contact sheet")
    parser.add_argument("--rows", metavar="A:B", help="list these rows; the sheet shows them (default: some, spread)")
    return parser


if __name__ == "__main__":
    run(main)
