"""The commands that a report shows, read as a shell reads them."""

import html
import shlex

from tests.tools.reported import Page, make_run
from tools.report import write_report
from tools.report_runs import read_run
from tools.report_settings import again, command_to_go_on
from train.config import parse_pretrain_config, read_run_config, resolved_dict


def test_the_command_that_goes_on(tmp_path):
    """With a name as the report itself gives it, and a folder whose name has a space."""
    folder = tmp_path / "my-again runs"
    run_dir = make_run(folder, "run-again", step=2)
    words = shlex.split(command_to_go_on(read_run(run_dir, "run")))
    assert words[:2] == ["python", "train/pretrain.py"]
    assert resolved_dict(parse_pretrain_config(words[2:])) == read_run_config(run_dir)
    assert command_to_go_on(read_run(run_dir, "run")) in html.unescape(again(read_run(run_dir, "run")))
    moved = run_dir.rename(folder / "other")
    assert "To go on with it" not in again(read_run(moved, "run"))


def test_commands_name_paths_as_a_shell_takes_them(tmp_path):
    run_dir = make_run(tmp_path / "my runs", step=2)
    page = Page(write_report(run_dir, pictures=False).read_text())
    named = [line for line in page.said if line.startswith("python ") and "my runs" in line]
    assert len(named) > 3
    for line in named:
        assert any(word.endswith((str(run_dir), f"{run_dir}/config.yaml")) for word in shlex.split(line))
