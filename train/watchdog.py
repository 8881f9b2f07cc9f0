"""Notice a rank that hangs or is gone, and say which: a collective that lacks a rank waits without a word.

The loop tells the watchdog whatever it begins (`beat`). A thread on every rank looks after it: if nothing was begun for
`timeout_s`, it finds by the heartbeats who holds up the others, says so in one line, writes the stacks of all threads
into the rank's log, and ends the process; nothing else can end a thread that waits inside a collective. Each rank does
so by itself: it does not matter which of them hangs. A crash in compiled code leaves its stack in that log as well.
"""

from __future__ import annotations

import faulthandler
import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from train.cli import EXIT_FAILED, EXIT_RESUMABLE, HEAD_START_S, RunFailed, RunInterrupted, RunStopped
from train.heartbeats import Heartbeats, Standing, is_of_a_collective, seconds_between
from train.runtime import Ranks

AGAIN = "the same command goes on from the last checkpoint"
DONE = "it was done"
LATE = 5  # looks missed in a row: this process itself was stopped, or its host was
MISSED = 3  # messages missed in a row: a rank that the others cannot reach is gone
PATIENCE = 12  # messages to wait for, until it shows who is gone


class Watchdog:
    """Watches over one rank; a context manager, entered by all ranks once there is a process group.

    Args:
        ranks: of this process.
        timeout_s: without a beat, after which the run is given up; 0: never.
        log_file: where stacks are written: the rank's log.
    """

    def __init__(self, ranks: Ranks, *, timeout_s: float, log_file: Path) -> None:
        self._ranks, self._timeout_s, self._log_file = ranks, timeout_s, log_file
        self._look_s = min(1.0, timeout_s / 10) if timeout_s else 1.0
        self._message_s = seconds_between(ranks.world_size, self._look_s)
        self._beat = (0, 0, "starting", time.monotonic())
        self._left, self._resumable = "", True
        self._explained = False
        self._ended = threading.Event()
        self._heartbeats: Heartbeats | None = None
        self._thread: threading.Thread | None = None
        self._file: BinaryIO | None = None

    def beat(self, step: int, doing: str) -> None:
        """Something begins, or goes on: the time starts again. Costs next to nothing.

        Args:
            step: the loop's count of steps; the same on all ranks at the same point.
            doing: what begins, in words for the user.
        """
        last_step, phase, last_doing, _ = self._beat
        if step != last_step:
            phase = 0
        elif doing != last_doing:
            phase += 1
        self._beat = (step, phase, doing, time.monotonic())

    def explain(self, error: BaseException) -> RunStopped | None:
        """What ends the run after `error` of this rank, if it came from another rank's absence; else None.

        Takes a few seconds, until it shows who is no longer heard of.

        Returns:
            `RunInterrupted` where a rank was lost; `RunFailed` where it left for a reason that would come again.
        """
        if self._heartbeats is None or not is_of_a_collective(error):
            return None
        self.beat(self._beat[0], "looking for the rank that was lost")
        asked_at = time.monotonic()
        while not (verdict := self._who_is_gone(self._heartbeats, error, asked_at)):
            if time.monotonic() - asked_at > PATIENCE * self._message_s:
                verdict = RunInterrupted(
                    f"the ranks could not reach each other in step {self._beat[0]} ({_cause(error)}), and yet all of "
                    f"them are still there; {AGAIN}"
                )
                break
            time.sleep(self._message_s / 4)
        self._explained = True
        return verdict

    def _who_is_gone(self, heartbeats: Heartbeats, error: BaseException, asked_at: float) -> RunStopped | None:
        news = dict(heartbeats.news)
        left = {rank: heard.standing for rank, heard in news.items() if heard.standing.left}
        for rank, standing in left.items():
            if not standing.resumable:
                return RunFailed(f"rank {rank} stopped at step {standing.step}: {standing.left}", alike=True)
        gone = [0] if heartbeats.store_lost and self._ranks.rank != 0 and 0 not in left else []
        gone = gone or heartbeats.silent(MISSED * self._message_s)
        if gone:
            told = "; ".join(self._last_of(rank, asked_at) for rank in gone)
            return RunInterrupted(f"{told}: {_cause(error)}; {AGAIN}", alike=0 not in gone)
        for standing in left.values():  # they found out first
            return RunInterrupted(standing.left, alike=0 not in left)
        return None

    def _last_of(self, rank: int, at: float) -> str:
        assert self._heartbeats is not None
        heard = self._heartbeats.news.get(rank)
        if heard is None:
            return f"rank {rank} was lost before it was heard of"
        ago = max(0.0, at - heard.heard_at)
        return f"rank {rank} was lost at step {self._beat[0]} (last heard of {ago:.1f} s ago, {heard.standing.doing})"

    def __enter__(self) -> Watchdog:
        self._file = self._log_file.open("ab", buffering=0)
        faulthandler.enable(self._file)
        if self._ranks.world_size > 1:
            self._heartbeats = Heartbeats(self._ranks, self._message_s, self._standing)
        if self._timeout_s:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._heartbeats is not None:
            self._say_farewell(self._heartbeats, error)
        faulthandler.disable()
        if self._file is not None:
            self._file.close()

    def _say_farewell(self, heartbeats: Heartbeats, error: BaseException | None) -> None:
        """Tell the others why this rank leaves, before they miss it."""
        if error is None:
            self._left = DONE
        else:
            self._left = " ".join(str(error).split()) or type(error).__name__
            self._resumable = isinstance(error, (RunInterrupted, KeyboardInterrupt))
        heartbeats.close(patience_s=2 * self._message_s)
        alone = isinstance(error, Exception) and (self._explained or not getattr(error, "alike", False))
        if alone and self._ranks.rank == 0:  # the store may end with this process: let the others read it
            time.sleep(MISSED * self._message_s)

    def _standing(self) -> Standing:
        step, phase, doing, at = self._beat
        return Standing(
            step=step,
            phase=phase,
            doing=doing,
            seconds=time.monotonic() - at,
            left=self._left,
            resumable=self._resumable,
        )

    def _watch(self) -> None:
        looked_at = since = time.monotonic()
        while not self._ended.wait(self._look_s):
            now = time.monotonic()
            if now - looked_at > LATE * self._look_s:
                since = now
            looked_at = now
            if now - max(self._beat[3], since) > self._timeout_s:
                self._give_up()

    def _give_up(self) -> None:
        """Without a lock that the hung thread may hold, logging's among them."""
        to_blame, line, code = self._verdict()
        assert self._file is not None
        others = [rank for rank in range(self._ranks.world_size) if rank not in to_blame]
        speaks = self._ranks.rank == min(others or to_blame)
        if speaks:
            os.write(2, f"error: {line}\n".encode())
        self._file.write(f"{line}\n".encode())
        faulthandler.dump_traceback(self._file)
        if not speaks:
            time.sleep(HEAD_START_S)  # else the launcher may end the speaker first
        os._exit(code)

    def _verdict(self) -> tuple[list[int], str, int]:
        """The ranks that hold up the others, the line that says so, and the code to exit with."""
        ours = self._standing()
        where = {self._ranks.rank: ours}
        to_blame: list[int] = []
        if self._heartbeats is not None:
            where |= {rank: heard.standing for rank, heard in self._heartbeats.news.items()}
            to_blame, told = self._silent(self._heartbeats)
        if not to_blame:
            to_blame = last_ranks(where)
            first = where[to_blame[0]]
            told = f"at step {first.step}, {first.doing}, for {first.seconds:.0f} s"
            if first.left:
                told = f"it left at step {first.step}: {first.left}"
        stacks = f"Stacks of all threads are in {self._log_file}"
        waits = ""
        if self._ranks.rank not in to_blame:
            waits = f"; rank {self._ranks.rank} waited {ours.seconds:.0f} s at step {ours.step}, {ours.doing}"
        for rank in to_blame:
            if not where.get(rank, ours).resumable:
                stopped = f"rank {rank} stopped at step {where[rank].step}: {where[rank].left}"
                return [rank], f"{stopped}{waits}. {stacks}", EXIT_FAILED
        if self._ranks.world_size == 1:
            who = "the run has"
        elif len(to_blame) == self._ranks.world_size:
            who = "all ranks have"
        else:
            who = f"rank {to_blame[0]} has" if len(to_blame) == 1 else f"ranks {', '.join(map(str, to_blame))} have"
        return to_blame, f"{who} hung: {told}{waits}. {stacks}; {AGAIN}", EXIT_RESUMABLE

    def _silent(self, heartbeats: Heartbeats) -> tuple[list[int], str]:
        """The ranks that are not heard of any more, and since when."""
        patience = self._timeout_s / 2
        silent = heartbeats.silent(patience)
        if silent and time.monotonic() - heartbeats.answered_at > patience and self._ranks.rank != 0:
            silent = [0]  # it keeps the store; of the others nothing is known
        if not silent:
            return [], ""
        heard = heartbeats.news.get(silent[0])
        if heard is None:
            return silent, "never heard of"
        ago = time.monotonic() - heard.heard_at
        return silent, f"last heard of {ago:.0f} s ago, at step {heard.standing.step}, {heard.standing.doing}"


def last_ranks(where: dict[int, Standing]) -> list[int]:
    """The ranks that stand furthest back, or that left before they were done: the others wait for them."""
    gone = [rank for rank, standing in where.items() if standing.left not in ("", DONE)]
    if gone:
        return sorted(gone)
    here = {rank: (standing.step, standing.phase) for rank, standing in where.items() if not standing.left}
    return sorted(rank for rank, place in here.items() if place == min(here.values()))


def _cause(error: BaseException) -> str:
    """The first sentence of a message from below, without the place in its source that it begins with."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(error).split()))
    return re.split(r"\. |: \[", text)[0].rstrip(".")
