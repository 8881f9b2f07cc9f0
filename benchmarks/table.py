"""Results as the Markdown tables that documents show: `python -m benchmarks.table RESULT.json …`.

A document marks where a table stands, and of which file:

    <!-- table: docs/results/2026-11-22-pipelines-cpu.json crop224 simclr224/lightly -->
    … generated …
    <!-- end -->

The path is from the root of the checkout. After it may stand what the table is to show, in this order: works, or pairs
of a work and a peer; without any, all ratios that have a goal, or all if none has. `--update DOCUMENT` writes the
tables into a document, those of the files named or else all of them; `stale_tables` tells which differ.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Ratio, Row
from benchmarks.results import Results, figure, read_results
from train.cli import run

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- table: (.*?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
OPENING = re.compile(r"^<!-- table: ", re.MULTILINE)
HEAD = "| work | against | ours | theirs | ratio | goal |\n|---|---|---|---|---|---|"

WORKS = {
    "crop224": "two 224² crops and flips, 500-pixel JPEGs",
    "simclr224": "the whole SimCLR recipe, two 224² views",
    "simclr32": "the recipe for CIFAR, two 32² views",
    "startup": "from the start of a process to its first batch",
    "rows1": "one 224² crop, rows that it does not need left out",
    "rows2": "two 224² crops, likewise",
    "scaled": "two 224² crops of large JPEGs, decoded at a smaller scale",
    "resnet50": "a LARS step, ResNet-50",
    "training_digits": "a whole pretraining step, on the digits of the demo",
    "resnet152x3sk": "a LARS step, ResNet-152 3× with selective kernels",
    "save_resnet50": "what a step waits for a checkpoint, ResNet-50",
    "resnet18_cifar10": "twenty linear heads at once, 512 features, 10 classes",
    "resnet50_100_classes": "twenty linear heads at once, 2048 features, 100 classes",
    "norm_r50_stage1": "batch norm, ResNet-50's first stage",
    "norm_r50_stage1_bf16": "batch norm, ResNet-50's first stage, bf16",
    "norm_r50_stage4": "batch norm, ResNet-50's last stage",
}
PEERS = {
    "twinview_dali": "ours through DALI",
    "torchvision": "torchvision v2 (Pillow), DataLoader",
    "torchvision_io": "torchvision v2 (`decode_jpeg`), DataLoader",
    "stock_ffcv": "stock FFCV",
    "dali_cpu": "DALI on the CPU",
    "jpeg_decode": "libjpeg-turbo's decode alone",
    "lightly": "lightly",
    "lightly_workers2": "lightly, torchvision, DataLoader",
    "solo_learn": "solo-learn's form",
    "google": "google-research/simclr's form",
    "metric_learning": "pytorch-metric-learning",
    "apex_larc": "apex LARC's form",
    "torch_sgd": "torch's fused SGD, without norms",
    "reference": "our reference",
    "torch": "torch",
    "torch_loops": "torch, one after the other",
    "torch_save": "`torch.save`",
    "in_the_step": "writing it in the step",
    "whole": "doing the whole",
    "one_worker": "one worker",
}


def work_title(work: str) -> str:
    """As a table names it; by its own name if no other is known."""
    if images := re.fullmatch(r"ntxent(\d+)", work):
        return f"NT-Xent forward and backward, {int(images[1]):,} images"
    if ranks := re.fullmatch(r"(.*)_ranks(\d+)", work):
        return f"{work_title(ranks[1])}, {ranks[2]} ranks"
    return WORKS.get(work, f"`{work}`")


def peer_title(peer: str) -> str:
    """Likewise."""
    return PEERS.get(peer, f"`{peer}`")


def table(results: Results, chosen: Sequence[str] = ()) -> str:
    """The table in Markdown.

    Args:
        results: of a file.
        chosen: works, and pairs `work/peer`, in the order in which they are to stand.

    Raises:
        ValueError: the file has no ratio of something chosen, or no ratio at all.
    """
    rows = {(row.work, row.contestant): row for row in results.rows}
    ratios = _choose(results, chosen)
    before = ["", *(ratio.work for ratio in ratios)]
    lines = [_line(ratio, rows, ratio.work != work) for ratio, work in zip(ratios, before, strict=False)]
    return "\n".join([HEAD, *lines])


def _choose(results: Results, chosen: Sequence[str]) -> list[Ratio]:
    with_goal = [ratio for ratio in results.ratios if ratio.goal is not None] or list(results.ratios)
    if not with_goal:
        raise ValueError("a table needs ratios, the results hold none")
    if not chosen:
        return with_goal
    ratios = []
    for name in chosen:
        work, _, peer = name.partition("/")
        found = [ratio for ratio in (results.ratios if peer else with_goal) if ratio.work == work]
        found = [ratio for ratio in found if peer in ("", ratio.second)]
        if not found:
            known = dict.fromkeys(ratio.work for ratio in results.ratios)
            raise ValueError(f"the results hold no ratio of `{name}`; they hold {', '.join(known)}")
        ratios += found
    return ratios


def _line(ratio: Ratio, rows: dict[tuple[str, str], Row], is_new: bool) -> str:
    """Work and our figure stand in the first line of a work alone."""
    ours, theirs = (rows.get((ratio.work, name)) for name in (ratio.first, ratio.second))
    goal = "" if ratio.goal is None else f"{ratio.goal:g}×"
    work, median = (work_title(ratio.work), _median(ours)) if is_new else ("", "")
    cells = (work, peer_title(ratio.second), median, _median(theirs))
    return f"| {' | '.join(cells)} | **{figure(ratio.ratio, '×')}** | {goal} |"


def _median(row: Row | None) -> str:
    return figure(row.median, row.unit) if row else ""


def caption(results: Results, link: str) -> str:
    """One line: on what, and where the rest is told."""
    about = results.environment
    machine = [f"{about.get('cores', '?')} cores of {about.get('device', 'an unknown processor')}"]
    machine += [about["gpus"]] if "gpus" in about else []
    rounds = sorted({ratio.rounds for ratio in results.ratios})
    facts = [", ".join(machine), f"torch {about.get('torch', '?')}", f"commit {str(about.get('commit', '?'))[:12]}"]
    if rounds:
        of = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        facts.append(f"medians of {of} interleaved rounds")
    return f"{'; '.join(facts)}: [{Path(link).name}]({link})."


def rendered(document: Path, marked: str, root: Path = ROOT) -> str:
    """What is to stand between the marks of a table, with blank lines around it.

    Args:
        document: where it stands, which its link starts from.
        marked: path and choice, as the opening mark has them.
        root: what the path is relative to.

    Raises:
        ValueError: the file cannot be read, or has no such ratios.
    """
    path, *chosen = marked.split()
    results = read_results(root / path)
    try:
        body = table(results, chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    link = os.path.relpath(root / path, document.resolve().parent)
    return f"\n{body}\n\n{caption(results, link)}\n\n"


def stale_tables(document: Path, root: Path = ROOT) -> list[str]:
    """A line for every marked table that is not what its file gives; none if all are."""
    text = document.read_text()
    stale = []
    if len(OPENING.findall(text)) != len(MARK.findall(text)):
        stale.append(f"{document}: every `<!-- table: … -->` needs its `<!-- end -->`, each on a line of its own")
    for marked, body in MARK.findall(text):
        try:
            if body != rendered(document, marked, root):
                stale.append(f"{document}: the table of {marked} is not what the file gives; run {_command(document)}")
        except ValueError as error:
            stale.append(f"{document}: {error}")
    return stale


def update(document: Path, wanted: Callable[[str], bool] = lambda path: True, root: Path = ROOT) -> int:
    """Write the tables of wanted files into a document; it is written whole or not at all.

    Returns:
        How many tables there are of these.

    Raises:
        ValueError: the document has no such table, or one of them cannot be made.
    """
    if not document.is_file():
        raise ValueError(f"{document}: no such document")
    text, count = document.read_text(), 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal count
        if not wanted(match[1].split()[0]):
            return match[0]
        count += 1
        return f"<!-- table: {match[1]} -->\n{rendered(document, match[1], root)}<!-- end -->"

    new = MARK.sub(replaced, text)
    if not count:
        raise ValueError(f"{document}: expected a table between `<!-- table: RESULT.json -->` and `<!-- end -->`")
    partial = document.with_name(f"{document.name}.partial")
    partial.write_text(new)
    partial.replace(document)
    return count


def _command(document: Path) -> str:
    return f"`python -m benchmarks.table --update {document.name}`"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="Results of benchmarks as Markdown tables.", allow_abbrev=False
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULT.json", help="what `--bench-json` wrote")
    parser.add_argument("--works", nargs="+", default=[], metavar="WORK", help="or WORK/PEER; default: what has a goal")
    parser.add_argument(
        "--update", type=Path, action="append", default=[], metavar="DOCUMENT", help="write its marked tables anew"
    )
    args = parser.parse_args()
    if not args.results and not args.update:
        raise ValueError("nothing to do: name result files, or documents after `--update`")
    paths = {path.resolve() for path in args.results}
    for document in args.update:
        count = update(document, lambda path: not paths or (ROOT / path).resolve() in paths)
        print(f"{document}: {count} table{'s' * (count != 1)} written")
    for path in [] if args.update else args.results:
        results = read_results(path)
        print(f"{table(results, args.works)}\n\n{caption(results, str(path))}\n")


if __name__ == "__main__":
    run(main)
