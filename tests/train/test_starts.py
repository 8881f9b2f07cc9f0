"""Each start of a run is on record: the command as it was typed, the step it went on from, the machine."""

import json
import subprocess
import sys

import pytest
import torch

from tests.train.runs import ROOT
from train.runtime import Ranks, package_versions
from train.starts import STARTS_FILE, as_typed, record_start

RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (["/venv/bin/python3.11", "train/pretrain.py", "--name", "a b"], "python train/pretrain.py --name 'a b'"),
        (["/v/bin/python", "/v/bin/deepspeed", "--num_gpus", "2", "t.py"], "deepspeed --num_gpus 2 t.py"),
        (["python", "/v/bin/torchrun", "--nproc_per_node", "2", "t.py"], "torchrun --nproc_per_node 2 t.py"),
        (["python", "-u", "t.py", "--local_rank=1", "--name=x"], "python -u t.py --name=x"),
    ],
)
def test_words_are_those_that_a_shell_takes(line, typed):
    assert as_typed(line) == typed


def test_every_start_is_a_line(tmp_path):
    for step in (0, 8):
        record_start(
            tmp_path, Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1), torch.device("cpu"), step=step
        )
    first, second = map(json.loads, (tmp_path / STARTS_FILE).read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 8)
    assert first["time"] <= second["time"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert first["commit"] == (commit.stdout.strip() or None)
    assert first["versions"] == package_versions()


def test_the_command_is_the_launchers(tmp_path):
    """A process that starts the script as a launcher does; the script tells what it takes for its command."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[0] = {str(ROOT)!r}\nfrom train.starts import _command\nprint(_command(2))\n"
    )
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-u', *sys.argv[2:]])\n")
    words = [sys.executable, launcher, "--nproc_per_node=2", script, "--name", "a b"]
    told = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout == f"torchrun --nproc_per_node=2 {script} --name 'a b'\n"
