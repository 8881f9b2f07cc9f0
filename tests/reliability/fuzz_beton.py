"""Fuzz the `.beton` reader, the decoder and all that stands on them.

    python -m tests.reliability.fuzz_beton --cases 200000 --seed 0 --jobs 2

A case is a file of the corpus with changes that follow from the seed and the case's number. Worker processes run cases
one after the other; the parent notices one that crashes or hangs, notes its case, saves its file, and starts another
worker behind it. Exit code 0: none did, and no exception came out that is not one of the documented errors.
"""

import argparse
import faulthandler
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from tests.reliability.fuzz_corpus import make_corpus
from tests.reliability.fuzz_draft import Draft
from tests.reliability.mutations import mutate

ROOT = Path(__file__).resolve().parents[2]
CASE_LIMIT_S = 60.0  # of a core; a case takes milliseconds
STALL_LIMIT_S = 600.0  # of the clock: a busy machine may take its time
IN_MEMORY = Path("/dev/shm")  # files there wait for no disk
OUTCOMES = (
    "not run",
    "refused at opening",
    "all views",
    "a sample refused",
    "no views",
    "unexpected error",
    "crash",
    "hang",
)
UNEXPECTED, CRASH, HANG = (OUTCOMES.index(name) for name in ("unexpected error", "crash", "hang"))


def make_case(drafts, seed, number):
    """Change one of the drafts; returns it and the case's own random numbers."""
    rng = random.Random(f"{seed}/{number}")
    draft = rng.choice(drafts)
    mutate(rng, draft)
    return draft, rng


def open_drafts(folder):
    return [Draft(path) for path in sorted(folder.glob("*.beton"))]


class Board:
    """What a worker and its parent tell each other, in a file: the case at hand, and an outcome a case."""

    def __init__(self, path, num_cases):
        if not path.exists():
            path.write_bytes(bytes(24 + num_cases))
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 24 + num_cases)
        self._now = np.frombuffer(memory, np.float64, 3)  # whose numbers are written whole, each at once
        self.outcomes = np.frombuffer(memory, np.uint8, num_cases, 24)

    def begin(self, number):
        """A case, or -1 for the start of a worker."""
        self._now[:] = number, time.monotonic(), time.process_time() if number >= 0 else 0.0

    def current(self):
        """The case at hand, since when, and the seconds of a core that the worker had taken by then."""
        number, since, begin = self._now.tolist()
        return int(number), since, begin


def work(args):
    """A worker: the cases `first`, `first` + `step` and so on, on a copy of the corpus of its own."""
    from tests.reliability.fuzz_views import exercise, prepare

    faulthandler.enable()
    board = Board(args.board, args.cases)
    drafts = open_drafts(args.corpus)
    if not args.first_done:
        for draft in drafts:
            exercise(draft.path, random.Random(0))  # compiles; a sound file must not fail
    prepare()
    for number in range(args.first, args.cases, args.step):
        draft, rng = make_case(drafts, args.seed, number)
        board.begin(number)
        draft.commit()
        try:
            board.outcomes[number] = OUTCOMES.index(exercise(draft.path, rng))
        except Exception:
            board.outcomes[number] = UNEXPECTED
            with args.failures.open("a", encoding="utf-8") as file:
                error = traceback.format_exc()
                file.write(json.dumps({"case": number, "file": draft.path.name, "error": error}) + "\n")
        draft.undo()
    board.begin(args.cases)


class Job:
    """A worker and those that follow it."""

    def __init__(self, args, folder, number):
        self.args, self.number, self.folder = args, number, folder / f"job{number}"
        shutil.copytree(folder / "corpus", self.folder)
        self.board = Board(self.folder / "board", args.cases)
        self.errors = self.folder / "stderr"
        self.failures = folder / "failures.jsonl"
        self.process = None
        self.start(number)

    def start(self, first):
        command = [sys.executable, "-m", "tests.reliability.fuzz_beton", "--worker", f"--first={first}"]
        command += [f"--{name}={getattr(self.args, name)}" for name in ("cases", "seed")]
        command += [f"--step={self.args.jobs}", f"--corpus={self.folder}", f"--board={self.folder / 'board'}"]
        command += [f"--failures={self.failures}"] + ["--first_done"] * (self.process is not None)
        self.board.begin(-1)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=errors, env=environment)

    def look(self):
        """Whether there is more to come."""
        code = self.process.poll()
        number, since, begin = self.board.current()
        if code is None:
            times = psutil.Process(self.process.pid).cpu_times()
            has_time = number < 0 or times.user + times.system - begin < CASE_LIMIT_S
            if has_time and time.monotonic() - since < STALL_LIMIT_S:
                return True
            self.process.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs
            self.process.wait()
            outcome = HANG
        elif code == 0:
            return False
        else:
            outcome = CRASH
        if number < 0:
            raise RuntimeError(f"the worker did not start:\n{self.errors.read_text()}")
        self.board.outcomes[number] = outcome
        stack = self.errors.read_text(errors="replace")[-4000:]
        with self.failures.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": number, "error": f"{OUTCOMES[outcome]}, exit code {code}\n{stack}"}) + "\n")
        if number + self.args.jobs >= self.args.cases:
            return False
        # The file at hand was left half changed.
        shutil.copytree(self.folder.parent / "corpus", self.folder, dirs_exist_ok=True)
        self.start(number + self.args.jobs)
        return True


def fuzz(args, folder):
    """Run all cases; returns the counts by outcome and what failed."""
    (folder / "corpus").mkdir()
    make_corpus(folder / "corpus")
    jobs = [Job(args, folder, number) for number in range(args.jobs)]
    try:
        running = jobs
        while running := [job for job in running if job.look()]:
            time.sleep(0.1)
    finally:
        for job in jobs:
            job.process.kill()
    counts = Counter(
        OUTCOMES[outcome] for number, job in enumerate(jobs) for outcome in job.board.outcomes[number :: args.jobs]
    )
    path = folder / "failures.jsonl"
    failures = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return counts, failures


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", type=Path, default=Path("/tmp"), help="folder for the files of failed cases")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name in ("first", "step"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("corpus", "board", "failures"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first_done", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main():
    args = parse()
    if args.worker:
        work(args)
        return 0
    begin = time.monotonic()
    place = IN_MEMORY if IN_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=place) as folder:
        counts, failures = fuzz(args, Path(folder))
        drafts = open_drafts(Path(folder) / "corpus")
        for failure in failures[:100]:
            draft, _ = make_case(drafts, args.seed, failure["case"])
            saved = args.save / f"case-{args.seed}-{failure['case']}.beton"
            saved.write_bytes(draft.content())
            draft.undo()
            print(f"case {failure['case']}, {saved}:\n{failure['error']}")
    seconds = time.monotonic() - begin
    rate = args.cases / seconds
    print(f"{args.cases} cases of seed {args.seed} in {seconds:.0f} s, {rate:.0f} a second: {dict(counts)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
