"""The page of a run: what was measured only at some lines, and pictures of what the model sees."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from tests.pipelines.betons import make_beton
from tests.train.runs import TINY
from tools.report import write_report
from train.config import claim_run_dir, parse_pretrain_config


@pytest.fixture
def run_dir(tmp_path):
    make_beton(tmp_path, [(24, 24)] * 4, encode="raw")
    words = ["--name=run", f"--runs_dir={tmp_path}", f"--data.path={tmp_path}/set.beton"]
    config = parse_pretrain_config([*TINY, *words, "--schedule.sizes=[[0,8],[1,16]]"])
    claim_run_dir(config)
    return config.run_dir


def test_figures_of_some_lines(run_dir):
    lines = [
        {"step": 1, "loss": 3.5, "images_per_sec": 9.0},
        {"step": 2, "loss": 3.25, "images_per_sec": 9.0, "probe_accuracy": 0.125, "knn_accuracy": 0.5},
        {"step": 3, "loss": 3.0, "images_per_sec": 9.0, "probe_accuracy": 0.25},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = write_report(run_dir).read_text()
    assert re.findall(r'alt="(.*?) by step, ending at (.*?)"', page) == [
        ("NT-Xent loss", "3"),
        ("accuracy of the online probe", "0.25"),
        ("accuracy of nearest neighbours", "0.5"),
        ("source images a second", "9"),
    ]
    sheets = re.findall(r'alt="view \d of (\d+) images" src="data:image/png;base64,(.*?)"', page)
    sides = [(int(count), Image.open(io.BytesIO(base64.b64decode(png))).size) for count, png in sheets]
    assert sides == [(4, (4 * 8, 8))] * 2  # those of epoch 0
    assert "Not evaluated yet" in page
