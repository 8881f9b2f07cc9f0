"""The facts of `tools.inspect_facts` as tables for a terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from tools.convert_places import human
from tools.pictures_canvas import shortened

MAX_CLASSES, MAX_FILES = 20, 20
NAME_WIDTH = 56
CLASSES_OF_LOAD = {
    "raw": "pixels; there is nothing to decode",
    "light": "small JPEGs",
    "medium": "JPEGs of the size that photographs are usually trained from",
    "heavy": "large JPEGs; converted anew with --encode jpeg they decode faster in every epoch",
}


def summary(facts: dict[str, Any], manifest_problem: str | None) -> Iterator[str]:
    """Lines about the whole set."""
    yield f"{facts['path']}: {facts['num_samples']} images, {human(facts['num_bytes'])}"
    yield from _files(facts["files"])
    modes = ", ".join(f"{count} {mode}" for mode, count in facts["modes"].items() if count)
    yield from ("", f"stored as   {modes}")
    columns = list(facts["bytes"])
    yield from _table(["", *columns], [[name, *facts[name].values()] for name in ("bytes", "width", "height")])
    for title, key in (("largest", "largest"), ("smallest", "smallest"), ("most pixels", "most_pixels")):
        yield from ("", title, *rows_table(facts[key]))
    yield from ("", *_classes(facts["classes"]))
    yield from ("", *_manifest(facts["manifest"], manifest_problem))
    yield from ("", *_decoding(facts["decoding"]))


def rows_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a sample."""
    lines = []
    for row in rows:
        label = "" if row["label"] is None else str(row["label"])
        shown = f"{label} {shortened(row['class'], 24)}" if row["class"] is not None else label
        name = shortened(row["name"], NAME_WIDTH) if row["name"] is not None else ""
        lines.append([row["row"], row["mode"], f"{row['width']}×{row['height']}", row["bytes"], shown, name])
    yield from _table(["row", "mode", "pixels", "bytes", "label", "file"], lines, left=(1, 4, 5))


def _files(files: list[dict[str, Any]]) -> Iterator[str]:
    first = files[0]
    if len(files) > 1:
        lines = [[shortened(file["path"], NAME_WIDTH), file["num_samples"], human(file["num_bytes"])] for file in files]
        yield from ("", f"{len(files)} shards", *_table(["file", "images", "size"], lines[:MAX_FILES], left=(0,)))
        if len(files) > MAX_FILES:
            yield f"  … and {len(files) - MAX_FILES} more"
    fields = ", ".join(f"{field['name']} ({field['type']})" for field in first["fields"])
    yield f"format      version {first['format_version']}; fields: {fields}"
    pages, tables, other = (sum(file[key] for file in files) for key in ("num_pages", "table_bytes", "other_bytes"))
    yield f"pages       {pages} of {human(max(file['page_size'] for file in files))}"
    yield (
        f"bytes       samples {human(sum(file['sample_bytes'] for file in files))}, tables {human(tables)}, "
        f"padding and other fields {human(other)}"
    )
    order = "one after the other" if all(file["is_in_order"] for file in files) else "not in the order of the rows"
    yield f"samples     {order}"
    for key, what in (
        ("samples_across_pages", "cross a page boundary: FFCV's page cache would misread them"),
        ("samples_that_overlap", "overlap the one before"),
    ):
        if found := sum(file[key] for file in files):
            yield f"            {found} {what}"


def _classes(classes: list[dict[str, Any]] | None) -> Iterator[str]:
    if classes is None:
        yield "classes     none; the images have no labels"
        return
    counts = [entry["count"] for entry in classes]
    yield f"classes     {len(classes)}, of {min(counts)} to {max(counts)} images"
    shown = classes[:MAX_CLASSES]
    lines = [[entry["label"], entry["count"], shortened(entry["name"] or "", NAME_WIDTH)] for entry in shown]
    yield from _table(["label", "images", "name"], lines, left=(2,))
    if len(classes) > MAX_CLASSES:
        yield f"  … and {len(classes) - MAX_CLASSES} more; --json lists all"


def _manifest(manifest: dict[str, Any] | None, problem: str | None) -> Iterator[str]:
    if manifest is None:
        yield f"manifest    {problem or 'none: no names, no checksums; FFCV writes none'}"
        return
    for title, key in (("options", "options"), ("libraries", "tools")):
        yield f"{title:<12}" + ", ".join(f"{name} {value}" for name, value in manifest[key].items())
    yield f"sha256      {manifest['sha256']}"
    if manifest["num_converted"]:
        yield f"converted   {manifest['num_converted']} that could not be kept"
    yield f"quarantine  {manifest['num_quarantined']} files were left out"
    lines = [[count, reason] for reason, count in manifest["quarantine_reasons"].items()]
    yield from _table(["files", "reason"], lines, left=(1,)) if lines else ()


def _decoding(decoding: dict[str, Any]) -> Iterator[str]:
    yield f"loading     {decoding['class']}: {CLASSES_OF_LOAD[decoding['class']]}"
    rate = decoding["images_per_sec_per_core"]
    if rate is not None and decoding["class"] != "raw":
        yield f"            about {rate:.0f} whole images decoded a second on one core, here and now"
    yield (
        f"            decoding the largest takes {human(decoding['bytes_per_thread'])} of memory a thread; "
        f"all images decoded are {human(decoding['pixel_bytes'])}"
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]], left: tuple[int, ...] = (0,)) -> Iterator[str]:
    cells = [list(head), *([_text(value) for value in line] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        aligned = [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield ("  " + "  ".join(aligned)).rstrip()


def _text(value: Any) -> str:
    text = (
        f"{value:.1f}"
        if isinstance(value, float) and not value.is_integer()
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
    return "".join(char if char.isprintable() else "�" for char in text)
