"""A study's numbers as Markdown: the table, the paper's beside it, and what was scaled down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.study_grid import ONLY
from tools.study_results import FIGURE_NAMES, measured_at, published_at


def to_markdown(result: Mapping[str, Any]) -> str:
    """The page of a study; see `tools.study_results.collect` and `tools.study` for what `result` holds."""
    lists = len(result["columns"]["values"]) == 1
    parts = [
        f"# {result['title']}",
        f"After {result['source']}. {_measured_how(result)}",
        _list(result) if lists else _matrices(result),
        _random(result),
        _order(result),
        _missing(result),
        _scale(result),
        _bullets("Mind", [*result["remarks"], *result["published"]["remarks"]]),
        f"```bash\n{result['command']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _measured_how(result: Mapping[str, Any]) -> str:
    counts = {len(f["by_seed"]) for cell in result["cells"] for f in cell["figures"].values()}
    several = " or ".join(str(count) for count in sorted(counts - {1}))
    spread = [f"mean ± standard deviation over {several} seeds; 95 % intervals are of that mean (Student's t)"] * (
        several != ""
    )
    if 1 in counts:
        which = "of cells without ±, one seed" if several else "one seed"
        spread += [f"{which}; 95 % intervals are for the size of the test set (Wilson), and say nothing of other seeds"]
    return f"Percent, at the last epoch, by `{result['protocol']}`; {'; '.join(spread)}."


def _list(result: Mapping[str, Any]) -> str:
    """One column: a line a row, and the paper's numbers in the same line."""
    (column,) = result["columns"]["values"]
    figures = result["figures"]
    known = {name for place in result["published"]["figures"] for name in place["figures"]}
    papers = [name for name in ("chance", *figures) if name in known]
    head = [result["rows"]["name"], *(FIGURE_NAMES[name] for name in figures)]
    head += [f"{FIGURE_NAMES[name]}, paper" for name in papers]
    lines = []
    for row in result["rows"]["values"]:
        ours = [_figure(measured_at(result, row, column, name)) for name in figures]
        lines.append([row, *ours, *(_paper(published_at(result, row, column, name)) for name in papers)])
    which = "" if column == ONLY else f"With {result['columns']['name']} {column}:\n\n"
    return f"{which}{grid_table(head, lines)}\n\nThe paper's: {result['published']['source']}."


def _matrices(result: Mapping[str, Any]) -> str:
    rows, columns, published = result["rows"], result["columns"], result["published"]
    figure, averages = result["figures"][0], result.get("averages", {})
    corner = f"{rows['name']} \\ {columns['name']}"
    lines = [
        [row, *(_figure(measured_at(result, row, column, figure), interval=False) for column in columns["values"])]
        + ([_percent(averages.get(row))] if result["symmetric"] else [])
        for row in rows["values"]
    ]
    head = [corner, *columns["values"], *(["average"] if result["symmetric"] else [])]
    ours = f"## Measured\n\n{grid_table(head, lines)}\n\n{_widths(result, figure)}"
    if not published["figures"]:
        return f"{ours}\n\n## Published\n\nOf {published['source']}."
    theirs = [
        [row, *(_paper(published_at(result, row, column, figure)) for column in published["columns"])]
        for row in published["rows"]
    ]
    table = grid_table([corner, *published["columns"]], theirs)
    return f"{ours}\n\n## Published\n\n{published['source'][0].upper()}{published['source'][1:]}.\n\n{table}"


def _widths(result: Mapping[str, Any], name: str) -> str:
    """How wide the intervals are that a matrix has no room for."""
    intervals = [cell["figures"][name]["interval"] for cell in result["cells"] if name in cell["figures"]]
    halves = sorted(50 * (high - low) for low, high in filter(None, intervals))
    return f"The 95 % intervals are between ± {halves[0]:.1f} and ± {halves[-1]:.1f} wide." if halves else ""


def _figure(figure: Mapping[str, Any] | None, *, interval: bool = True) -> str:
    if figure is None:
        return ""
    text = _percent(figure["mean"])
    if len(figure["by_seed"]) > 1:
        text += f" ± {100 * figure['std']:.1f}"
    if interval and figure["interval"] is not None:
        low, high = (100 * bound for bound in figure["interval"])
        text += f" [{low:.1f}, {high:.1f}]"
    return text


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _random(result: Mapping[str, Any]) -> str:
    if not result["random"]:
        return ""
    figures = ", ".join(f"{FIGURE_NAMES[name]} {100 * value:.1f}" for name, value in result["random"].items())
    differ = any(key.startswith("model.encoder") for cell in result["cells"] for key in cell["overrides"])
    whose = f"The network of {result['random_cell']}" if differ else "The same network"
    return f"{whose} with random weights: {figures}. Guessing: {result['guess']}."


def _order(result: Mapping[str, Any]) -> str:
    order = result["order"]
    if order is None:
        return ""
    return (
        f"Order against the paper's: Spearman's ρ = {order['spearman']:.2f} over the {order['cells']} cells that both "
        "have (1: the same order, 0: no relation)."
    )


def _missing(result: Mapping[str, Any]) -> str:
    missing = result["missing"]
    return f"**Not measured yet, or failed:** {', '.join(missing)}." if missing else ""


def _scale(result: Mapping[str, Any]) -> str:
    table = grid_table(["", "paper", "here"], result["scaled_down"])
    return f"## Scaled down\n\n{table}"


def _bullets(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
