"""Runs to report on, made by hand, and a page as a parser sees it."""

import json
import math
from html.parser import HTMLParser

import torch

from tests.train.runs import TINY
from train.checkpoint import Checkpoint, checkpoint_path, save_checkpoint
from train.config import claim_run_dir, parse_pretrain_config, resolved_dict

VOID = {"meta", "img"}


def make_run(folder, name="run", *words, data="no.beton", lines=(), step=0, position=None, loader=None):
    """A run directory with a configuration, metrics and, after `step` steps, a checkpoint without tensors."""
    config = parse_pretrain_config([*TINY, f"--name={name}", f"--runs_dir={folder}", f"--data.path={data}", *words])
    claim_run_dir(config)
    text = "".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)
    (config.run_dir / "metrics.jsonl").write_text(text)
    if step:
        save_checkpoint(
            checkpoint_path(config.run_dir, step),
            Checkpoint(
                model={"weight": torch.zeros(1)},
                position={"step": step} | (position or {}),
                config=resolved_dict(config),
                versions={"torch": "2.15.0"},
                loader=loader or {},
            ),
        )
    return config.run_dir


def metrics(num, *, start=1000.0, seconds=2.0, **more):
    """Lines of so many steps of 16 images, each of which took so many seconds."""
    return [
        {"step": i + 1, "loss": 5.0 - math.log(i + 1), "images_per_sec": 16 / seconds, "data_wait": 0.25}
        | {"time": start + seconds * (i + 1)}
        | more
        for i in range(num)
    ]


class Page(HTMLParser):
    """What of a page can be right or wrong."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.rows, self.said, self.open = [], [], [], []
        self.feed(source)
        self.close()
        self.text = " ".join("".join(self.said).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.said.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def of(self, tag):
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def headings(self):
        return [int(name[1]) for name, _ in self.tags if len(name) == 2 and name[0] == "h" and name[1].isdigit()]
