"""The guides that change the code: their files and differences go into a copy of the repository, and that one runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.documents.commands import ROOT
from tests.pipelines.betons import make_beton
from tests.train.runs import TINY, environment

PACKAGES = ("native", "pipelines", "model", "train", "tools", "tests")


def copy_of(tmp_path, guide):
    """The packages, changed as the guide says."""
    copy = tmp_path / "copy"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "docs/guides" / guide).read_text()
    for path, source in re.findall(r"^`([\w/.]+\.py)`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert not (copy / path).exists()
        (copy / path).write_text(source)
    for difference in re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        result = subprocess.run(
            ["git", "apply", "-p1", "-"],
            cwd=copy,
            input=difference,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    return copy


def losses(copy, data, runs_dir, *options, launcher=()):
    command = [sys.executable, *launcher, "train/pretrain.py", "--name=run", f"--runs_dir={runs_dir}"]
    command += [f"--data.path={data}", *TINY, "--train.epochs=2", *options]
    result = subprocess.run(command, cwd=copy, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (runs_dir / "run/metrics.jsonl").read_text().splitlines()]


def test_the_guides_apply_to_the_code_as_it_is(tmp_path):
    copy = copy_of(tmp_path, "adding_a_method.md")
    assert "barlow_twins" in (copy / "model/build.py").read_text()


@pytest.mark.slow
def test_the_method_of_the_guide_trains_alike_on_one_rank_and_two(tmp_path):
    copy = copy_of(tmp_path, "adding_a_method.md")
    (tmp_path / "set").mkdir()
    data = make_beton(tmp_path / "set", [(24, 20)] * 64).path
    one = losses(copy, data, tmp_path / "one", "--model.method=barlow_twins")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = losses(copy, data, tmp_path / "two", "--model.method=barlow_twins", launcher=launcher)
    assert one == pytest.approx(two, rel=1e-3)
    assert one[-1] < one[0]
