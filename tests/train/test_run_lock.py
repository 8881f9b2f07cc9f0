"""Two processes and one run directory."""

import signal
import subprocess
import sys

import pytest

from tests.train.runs import ROOT
from train.run_lock import locked_run_dir

HOLD = """
import sys, time
from pathlib import Path
from train.run_lock import locked_run_dir
with locked_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_run_directory_is_held_until_its_process_is_gone_however_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            refused = pytest.raises(ValueError, match=r"belongs to a run that is still going on, .*`name`$")
            with refused, locked_run_dir(tmp_path, patience_s=0.3):
                pass
            with locked_run_dir(tmp_path, enabled=False):
                pass  # other ranks take no part
        finally:
            process.send_signal(signal.SIGKILL)
    with locked_run_dir(tmp_path):
        pass
