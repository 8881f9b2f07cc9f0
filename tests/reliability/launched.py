"""A run under a launcher, and what is left of it."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.reliability import held
from tests.reliability.processes import PATIENCE_S, kill_stragglers, ranks_of, wait_for
from tests.train.runs import BIN, deepspeed, finish, pretrain, start
from train.runtime import free_port


def torchrun(num_ranks=2):
    return (BIN / "torchrun", f"--nproc_per_node={num_ranks}", f"--master_port={free_port()}")


def deepspeed_launcher():
    return deepspeed(free_port())


class Launched:
    """One start of the script under a launcher, held by `hold`; a context manager that leaves no process behind."""

    def __init__(self, runs_dir, data, *overrides, launcher, hold):
        self.runs_dir, self.run_dir = Path(runs_dir), Path(runs_dir, "run")
        command = pretrain(runs_dir, data, *overrides, launcher=(*launcher, held.SCRIPT))
        self.process = start(command, hold.variables, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()

    def wait_for(self, condition, timeout_s=PATIENCE_S):
        wait_for(condition, self.process, timeout_s)

    def send_rank(self, rank, number):
        os.kill(ranks_of(self.runs_dir)[rank], number)

    def kill(self):
        """Everything at once, as where power goes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        kill_stragglers(self.runs_dir)
        self.process.wait()

    def end(self, timeout_s=PATIENCE_S):
        """Wait for the launcher; returns its exit code and the lines that told the user of an error."""
        code, _, err = finish(self.process, timeout_s)
        return code, [line for line in err.splitlines() if line.startswith("error: ")]
