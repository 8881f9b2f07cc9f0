"""Train and evaluate the cells of a study: several at once, each step a process of its own, each result a file.

A cell whose record is there is left alone; one that was interrupted goes on from its last checkpoint. A cell that fails
is named with its log, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tools.study_grid import ACCURACY, CONTRASTIVE_ACCURACY, configure
from tools.study_records import Trial, keep, kept, measured_so, random_so, read_json, write_json
from train.cli import EXIT_INTERRUPTED, EXIT_RESUMABLE, RunFailed, RunInterrupted
from train.config import PretrainConfig, resolved_dict
from train.metrics import read_metrics
from train.runtime import free_port

Launcher = Literal["python", "deepspeed", "torchrun"]
ROOT = Path(__file__).resolve().parents[1]
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """What every cell is trained and evaluated with."""

    base: PretrainConfig
    protocol: str
    train_data: str
    test_data: str
    evaluation_options: tuple[str, ...] = ()
    """Further words for the protocol's command."""
    launcher: Launcher = "python"
    num_ranks: int = 1
    jobs: int = 1
    """Cells at once; each has its share of the cores that this process may use."""


class Children:
    """The processes that a study has started; all of them can be told to end."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopping = False

    def call(self, command: Sequence[str], log: Path) -> int:
        """Run a command, with what it prints at the end of `log`; returns its exit code."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where launchers look for helpers
        modules = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            with self._lock:
                if self.stopping:
                    return EXIT_RESUMABLE
                process = subprocess.Popen(
                    command,
                    env=os.environ | {"PATH": path, "PYTHONPATH": modules},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches it once, through us
                )
                self._running.add(process)
            try:
                return process.wait()
            except BaseException:  # a signal, where the main thread waits
                _ask_to_end(process)
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """Ask all of them, and the ranks of their launchers, to end; training saves a checkpoint first."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                _ask_to_end(process)


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGTERM)


def run_trials(trials: Sequence[Trial], how: HowToRun, children: Children, tell: Callable[[str], None]) -> None:
    """Train and evaluate what has no record yet.

    Args:
        trials: of the study.
        how: to run them.
        children: start their processes.
        tell: what is shown to the user, a line at a time.

    Raises:
        RunFailed: some failed; their names and logs, after all others are done.
        RunInterrupted: told to stop; the same command goes on.
    """
    waiting = [trial for trial in trials if measured_so(trial, how.protocol, how.evaluation_options) is None]
    failures: list[str] = []
    with ThreadPoolExecutor(how.jobs, initializer=_take_cores, initargs=(_shares(how.jobs),)) as pool:
        try:  # from here on, since a signal may come as soon as the first one is started
            futures = {pool.submit(_run_trial, trial, how, children): trial for trial in waiting}
            for done, future in enumerate(_as_they_end(futures), len(trials) - len(waiting) + 1):
                trial = futures[future]
                try:
                    future.result()
                    tell(f"{done}/{len(trials)}  {_summary(trial, how)}")
                except RunFailed as error:
                    failures.append(f"{trial.name} ({error}; {trial.file('log')})")
                    tell(f"{done}/{len(trials)}  failed: {failures[-1]}")
        except BaseException:
            children.stop()
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise RunFailed(f"{len(failures)} of {len(trials)} cells failed: {'; '.join(failures)}")


def _as_they_end(futures: dict[Future[None], Trial]) -> Any:
    """Futures in the order in which they end; a signal is heard while waiting."""
    left = set(futures)
    while left:
        ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from ended


def _shares(jobs: int) -> queue.SimpleQueue[set[int]]:
    """The cores of this process, dealt out; where there are fewer than jobs, they are dealt out again."""
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(set(cores[job::jobs]) or {cores[job % len(cores)]})
    return shares


def _take_cores(shares: queue.SimpleQueue[set[int]]) -> None:
    """This thread's, and so of every process that it starts."""
    os.sched_setaffinity(0, shares.get())


def _run_trial(trial: Trial, how: HowToRun, children: Children) -> None:
    trial.folder.mkdir(parents=True, exist_ok=True)
    trained = kept(trial, "trained.json")
    if trained is None:
        config = configure(how.base, trial.cell, seed=trial.seed, runs_dir=str(trial.folder))
        path = trial.file("yaml")
        path.write_text(yaml.safe_dump(resolved_dict(config), sort_keys=False))
        command = [*launch(how), _script("train/pretrain.py"), "--config", str(path.resolve())]
        trained = {"command": command, "seconds": _timed(command, trial, children)}
        keep(trial, "trained.json", trained)
    output = trial.folder / f"seed{trial.seed}-{how.protocol}"
    shutil.rmtree(output, ignore_errors=True)  # of an evaluation that did not come to its end
    command = measurement(trial, how, output)
    seconds = _timed(command, trial, children)
    figures = measured(output) | of_training(trial.run_dir)
    keep(
        trial,
        f"{how.protocol}.json",
        {
            "cell": trial.cell.name,
            "row": trial.cell.row,
            "column": trial.cell.column,
            "seed": trial.seed,
            "protocol": how.protocol,
            "evaluation_options": list(how.evaluation_options),
            "figures": figures,
            "seconds": {"train": trained["seconds"], "evaluate": seconds},
            "command": command,
        },
    )


def run_random(trial: Trial, how: HowToRun, record: Path, children: Children) -> None:
    """Evaluate the network that a trained trial started from, with open residual branches, as the others' baseline.

    Nothing is done for a trial that is not trained, or not measured by a protocol.
    """
    if trial.cell.measure != "protocol" or not trial.file("trained.json").exists():
        return
    if random_so(record, how.evaluation_options) is not None:
        return
    output = trial.folder / f"seed{trial.seed}-{how.protocol}-{RANDOM}"
    shutil.rmtree(output, ignore_errors=True)
    command = measurement(trial, how, output, RANDOM)
    seconds = _timed(command, trial, children)
    figures = {"cell": trial.cell.name, "figures": measured(output), "seconds": {"evaluate": seconds}}
    about = {"protocol": how.protocol, "evaluation_options": list(how.evaluation_options), "command": command}
    write_json(record, figures | about)


def launch(how: HowToRun) -> list[str]:
    """What stands before the script."""
    if how.launcher == "python":
        return [sys.executable]
    program = str(Path(sys.executable).with_name(how.launcher))
    ranks = "--num_gpus" if how.launcher == "deepspeed" else "--nproc_per_node"
    return [program, ranks, str(how.num_ranks), "--master_port", str(free_port())]


def _script(name: str) -> str:
    """One of ours, as it is called from here: a study may be started in any folder."""
    return os.path.relpath(ROOT / name)


def measurement(trial: Trial, how: HowToRun, output: Path, representation: str = "learned") -> list[str]:
    """The command that measures a run, and leaves one JSON file in `output`."""
    run_dir, train_data, test_data = (str(Path(p).resolve()) for p in (trial.run_dir, how.train_data, how.test_data))
    test, device = f"--test_data={test_data}", f"--device={how.base.train.device}"
    if trial.cell.measure == "protocol":
        words = [
            _script("train/evaluate.py"),
            how.protocol,
            f"--checkpoint={run_dir}",
            f"--train_data={train_data}",
            test,
        ]
        words += [device, f"--representation={representation}", f"--output_dir={output.resolve()}"]
        return [sys.executable, *words, *how.evaluation_options]
    words = ["-m", "tools.study_measure", trial.cell.measure, f"--run={run_dir}", test, device]
    if trial.cell.measure == "transformation":
        words += [f"--task={trial.cell.row}", f"--train_data={train_data}"]
    return [sys.executable, *words, f"--output={(output / 'measured.json').resolve()}"]


def measured(output: Path) -> dict[str, Any]:
    """The figures in the one result that a measurement has written: of a protocol, the accuracy with all labels.

    Raises:
        RunFailed: there is no such result.
    """
    results = sorted(output.glob("*.json"))
    if len(results) != 1:
        raise RunFailed(f"the evaluation left {len(results)} results in {output}, not one")
    result = read_json(results[0]) or {}
    if "accuracy" not in result and "figures" in result:
        return dict(result["figures"])
    if "all" not in result.get("accuracy", {}):
        raise RunFailed(f"{results[0]} holds no accuracy with all labels")
    return {ACCURACY: result["accuracy"]["all"]["mean"]}


def of_training(run_dir: Path) -> dict[str, Any]:
    """What the run's metrics tell of its last epoch: means over its lines, of which the last tells the step."""
    lines = read_metrics(run_dir)
    last = [line for line in lines if int(line["epoch"]) == int(lines[-1]["epoch"])]
    names = [name for name in ("loss", "images_per_sec", CONTRASTIVE_ACCURACY) if name in last[-1]]
    return {name: statistics.fmean(line[name] for line in last) for name in names} | {"step": last[-1]["step"]}


def _timed(command: list[str], trial: Trial, children: Children) -> float:
    """Seconds that a command took.

    Raises:
        RunFailed: it failed; with its own last words.
        RunInterrupted: the study is to stop.
    """
    started = time.perf_counter()
    code = children.call(command, trial.file("log"))
    if code != 0 and children.stopping:
        raise RunInterrupted("stopped")
    if code in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
        raise RunFailed("it was stopped from outside; the same command goes on")
    if code < 0:
        raise RunFailed(f"killed by {signal.Signals(-code).name}; if the machine ran out of memory, take fewer `jobs`")
    if code != 0:
        raise RunFailed(_last_words(trial.file("log")) or f"ended with code {code}")
    return time.perf_counter() - started


def _last_words(log: Path) -> str:
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""


def _summary(trial: Trial, how: HowToRun) -> str:
    record = read_json(trial.file(f"{how.protocol}.json"))
    assert record is not None
    seconds = record["seconds"]
    shares = [record["figures"][name] for name in (ACCURACY, "h", "z") if name in record["figures"]]
    figures = " and ".join(f"{100 * share:.1f}" for share in shares)
    return f"{trial.name}: {figures} % (training {seconds['train']:.0f} s, evaluation {seconds['evaluate']:.0f} s)"
