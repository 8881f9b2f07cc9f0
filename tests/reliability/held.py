"""Runs that stand still after certain steps, so that a test may look and strike as late as it likes.

python tests/reliability/held.py train/pretrain.py OPTION…

runs the script as it is; but rank 0, having written the metrics of such a step, waits until it is let go or takes a
signal. It stands within the step: what the step still has to do, such as its checkpoint, comes after.
"""

import os
import runpy
import select
import signal
import sys
import tempfile
from pathlib import Path

SCRIPT = "tests/reliability/held.py"
FOLDER, STEPS = "TWINVIEW_TEST_HOLD_FOLDER", "TWINVIEW_TEST_HOLD_STEPS"
HANG_TIMEOUT = "TWINVIEW_TEST_HANG_TIMEOUT"
LOOK_S = 0.01


class Hold:
    """The steps at which one run, or one after another in the same folder, is held.

    Args:
        folder: for a folder of its own, by which both sides tell each other.
        steps: rising; metrics must be written after each.
        hang_timeout_s: `train.hang_timeout_s` of all ranks from the first of the steps on; until then it is what the
            configuration says, since a start, and what is compiled in it, may take as long as it likes.

    Attributes:
        variables: for the environment of the ranks.
    """

    def __init__(self, folder, *steps, hang_timeout_s=None):
        self._folder = Path(tempfile.mkdtemp(prefix="hold-", dir=folder))
        self._steps = steps
        self.variables = {
            FOLDER: str(self._folder),
            STEPS: ",".join(map(str, steps)),
            "GOMP_SPINCOUNT": "1000",  # these as the script sets them before torch is loaded
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        if hang_timeout_s is not None:
            self.variables[HANG_TIMEOUT] = str(hang_timeout_s)

    def reached(self, step):
        """Whether the run has come to this step and stands there, if nothing has let it go."""
        return _held(self._folder, step).exists()

    def release(self, *steps):
        """Let it go on, from there (default: from all of them), now or when it comes there."""
        for step in steps or self._steps:
            _released(self._folder, step).touch()


def hold_as_told():
    """In a rank: hold it as the environment says, if it says so."""
    if STEPS not in os.environ:
        return
    folder, steps = Path(os.environ[FOLDER]), set(map(int, os.environ[STEPS].split(",")))
    if HANG_TIMEOUT in os.environ:
        _lose_patience(min(steps), float(os.environ[HANG_TIMEOUT]))
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    from train.metrics import MetricsWriter

    write = MetricsWriter.write

    def write_and_wait(self, step, metrics):
        write(self, step, metrics)
        if step in steps:
            _wait(folder, step)

    MetricsWriter.write = write_and_wait


def _lose_patience(first_step, timeout_s):
    from train.watchdog import Watchdog

    beat = Watchdog.beat

    def beat_and_lose_patience(self, step, doing):
        beat(self, step, doing)
        if step >= first_step:
            self._timeout_s = timeout_s

    Watchdog.beat = beat_and_lose_patience


def _wait(folder, step):
    signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(wake)
    _held(folder, step).touch()
    while not _released(folder, step).exists() and not select.select([signals], [], [], LOOK_S)[0]:
        pass
    signal.set_wakeup_fd(before)
    os.close(signals)
    os.close(wake)


def _held(folder, step):
    return folder / f"held-{step}"


def _released(folder, step):
    return folder / f"released-{step}"


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    hold_as_told()
    script = next(word for word in sys.argv[1:] if not word.startswith("-"))  # DeepSpeed puts an option before it
    sys.argv.remove(script)
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
