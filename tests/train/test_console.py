"""The console: the line's words, its pace, and what it does to a terminal and to a file."""

import fcntl
import io
import json
import logging
import math
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Run
from tests.reliability.processes import PATIENCE_S
from train.console import SETTLING_S, Console, Pace, duration, progress_line
from train.metrics import METRICS_FILE

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"loss": 4.8123, "images_per_sec": 2310.4, "data_wait": 0.004, "lr": 0.3}


def line(columns=None, **options):
    given = {"epoch": 2, "num_epochs": 100, "step": 1240, "total_steps": 39_000, "metrics": METRICS, "eta_s": 11_520.0}
    return progress_line(**given | options, columns=columns)


def test_the_line():
    assert line() == "epoch 3/100  step 1,240/39,000  loss 4.812  2,310 images/s  data-wait 0.4 %  ETA 3 h 12 min"
    assert line(eta_s=None, metrics={"loss": math.nan}) == "epoch 3/100  step 1,240/39,000  loss nan"
    assert line(eta_s=None, metrics={"images_per_sec": 0.94}).endswith("  0.9 images/s")
    more = METRICS | {"probe_accuracy": 0.6125, "knn_accuracy": 0.5}
    assert line(metrics=more, step=39_000, epoch=99) == (
        "epoch 100/100  step 39,000/39,000  loss 4.812  2,310 images/s  data-wait 0.4 %  probe 61.3 %  kNN 50.0 %  done"
    )


def test_a_narrow_terminal_gets_what_matters_most():
    assert line(columns=70) == "epoch 3/100  step 1,240/39,000  loss 4.812  ETA 3 h 12 min"
    assert line(columns=50) == "step 1,240/39,000  loss 4.812  ETA 3 h 12 min"
    assert line(columns=30) == "step 1,240/39,000  loss 4.812"
    assert line(columns=20) == "step 1,240/39,000"
    assert line(columns=5) == "step "
    assert all(len(line(columns=columns)) <= columns for columns in range(120))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (44.2, "45 s"),
        (59.9, "60 s"),
        (60.0, "1 min"),
        (719.0, "12 min"),
        (3599.0, "1 h 0 min"),
        (11_520.0, "3 h 12 min"),
        (47.9 * 3600, "47 h 54 min"),
        (48 * 3600, "2 d 0 h"),
        (6.2 * 86_400, "6 d 4 h"),
    ],
)
def test_durations_as_a_person_says_them(seconds, words):
    assert duration(seconds) == words


def test_the_pace_knows_the_first_stretch_at_once_and_forgets_the_old_one():
    assert Pace().eta_s(100) is None
    pace = Pace().then(10, 20.0)
    assert pace.eta_s(100) == pytest.approx(200.0)
    for _ in range(20):
        pace = pace.then(10, 20.0)
    assert pace.eta_s(100) == pytest.approx(200.0)  # a steady run has a steady ETA
    pace = pace.then(10, 40.0)  # larger views: twice the time
    assert 200.0 < pace.eta_s(100) < 300.0
    for _ in range(int(5 * SETTLING_S / 40.0)):
        pace = pace.then(10, 40.0)
    assert pace.eta_s(100) == pytest.approx(400.0, rel=0.02)


def test_the_weight_of_the_past_is_that_of_its_age():
    pace = Pace(steps=100.0, seconds=60.0).then(1, SETTLING_S)
    assert (pace.steps, pace.seconds) == pytest.approx((100 / math.e + 1, 60 / math.e + SETTLING_S))


def test_a_file_gets_the_first_line_the_last_and_few_between():
    out = io.StringIO()
    console = Console(stream=out, interval_s=3600.0)
    with console.start(num_epochs=2, total_steps=40):
        for step in range(10, 41, 10):
            console.write(step // 21, step, METRICS)
    assert [text[:25] for text in out.getvalue().splitlines()] == [
        "epoch 1/2  step 10/40  lo",
        "epoch 2/2  step 40/40  lo",
    ]
    assert out.getvalue().isprintable() is False  # it has newlines,
    assert out.getvalue().replace("\n", "").isprintable()  # and nothing else that is no text


def test_a_run_that_stops_shows_where():
    out = io.StringIO()
    console = Console(stream=out, interval_s=3600.0)
    with console.start(num_epochs=2, total_steps=40):
        console.write(0, 10, METRICS)
        console.write(0, 20, METRICS | {"knn_accuracy": 0.5})
        console.write(1, 30, METRICS)
    first, last = out.getvalue().splitlines()
    assert first.startswith("epoch 1/2  step 10/40")
    assert last.startswith("epoch 2/2  step 30/40")
    assert "  kNN 50.0 %  ETA " in last  # the newest one, though it was measured a while ago


def test_the_ranks_that_are_not_enabled_say_nothing():
    out = io.StringIO()
    console = Console(stream=out, enabled=False)
    with console.start(num_epochs=1, total_steps=10):
        console.write(0, 10, METRICS)
        console.handle(logging.LogRecord("a", logging.WARNING, "", 0, "b", (), None))
    assert out.getvalue() == ""


def test_a_console_that_is_gone_is_left_alone(caplog):
    out = io.StringIO()
    console = Console(stream=out, interval_s=0.0)
    with console.start(num_epochs=1, total_steps=30):
        console.write(0, 10, METRICS)
        out.close()
        console.write(0, 20, METRICS)
        console.write(0, 30, METRICS)
    assert caplog.messages == [
        "the console cannot be written to any more (I/O operation on closed file); the run goes on without it"
    ]


ON_A_TERMINAL = """
import logging, os, sys
sys.path[0] = os.getcwd()
from train.console import Console
console = Console()
logging.getLogger().handlers = [console]
metrics = {"loss": 4.8123, "images_per_sec": 2310.4, "data_wait": 0.004}
with console.start(num_epochs=9, total_steps=900):
    console.write(0, 10, metrics)
    logging.info("not for people")
    logging.warning("sample %d cannot be decoded", 7)
    console._next_time = 0.0
    console.write(8, 900, {"loss": 1.0})
print("after", file=sys.stderr)
"""


def on_a_terminal(columns):
    """What a terminal of so many columns receives from the program above."""
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], cwd=ROOT, stderr=writer)
    os.close(writer)
    received = b""
    while True:
        select.select([reader], [], [], PATIENCE_S)
        try:
            received += (chunk := os.read(reader, 4096))
        except OSError:  # EIO: the other end is closed
            chunk = b""
        if not chunk:
            break
    os.close(reader)
    assert process.wait(PATIENCE_S) == 0
    return received.decode().replace("\r\n", "\n")


def test_a_terminal_has_its_line_rewritten_and_warnings_above_it():
    first = "epoch 1/9  step 10/900  loss 4.812  2,310 images/s  data-wait 0.4 %"
    last = "epoch 9/9  step 900/900  loss 1.000  2,310 images/s  data-wait 0.4 %  done"
    warning = "WARNING: sample 7 cannot be decoded"
    assert on_a_terminal(120) == f"\r{first}\r{' ' * len(first)}\r{warning}\n{first}\r{last}\nafter\n"
    short = "epoch 1/9  step 10/900  loss 4.812"
    last = "step 900/900  loss 1.000  done"
    last = last.ljust(len(short))  # covers what stood there
    assert on_a_terminal(37) == f"\r{short}\r{' ' * len(short)}\r{warning}\n{short}\r{last}\nafter\n"


def everything_from(reader, is_over):
    """What arrives at a terminal until `is_over()`."""
    received = b""
    while not is_over():
        if select.select([reader], [], [], 0.05)[0]:
            received += os.read(reader, 4096)
    while select.select([reader], [], [], 0.0)[0]:
        received += os.read(reader, 4096)
    return received.decode()


def damage(beton, sample):
    """A JPEG that cannot be decoded."""
    with beton.path.open("r+b") as file:
        file.seek(int(beton.offsets[sample]))
        file.write(b"no JPEG")


@pytest.mark.distributed
def test_the_script_in_a_file_and_on_a_terminal(tmp_path):
    """Two ranks whose output goes to files, as under Slurm; then one on a terminal."""
    beton = make_beton(tmp_path, [(24, 20)] * 48)
    damage(beton, 11)
    (tmp_path / "file").mkdir()
    begin = time.monotonic()
    with Run(tmp_path / "file", beton.path, "--data.on_error=skip") as run:
        run.assert_done()
    check_the_file(run, time.monotonic() - begin)
    check_the_logs(run)
    check_the_metrics(run.run_dir)

    (tmp_path / "terminal").mkdir()
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    Path(tmp_path, "terminal", "output-0").symlink_to(os.ttyname(writer))
    with Run(tmp_path / "terminal", beton.path, "--data.on_error=skip", "--train.epochs=2", world_size=1) as run:
        received = everything_from(reader, lambda: not run.ranks[0].running())
        assert run.end() == [0], received
    os.close(reader)
    os.close(writer)
    check_the_terminal(received)


def check_the_file(run, seconds):
    """Few and plain lines: of 9, the first, the last, and one each half a minute."""
    lines = [line for line in run.ranks[0].text().splitlines() if not line.startswith("WARNING: ")]
    assert 2 <= len(lines) <= 2 + seconds // 30, lines
    assert lines[0].startswith("epoch 1/3  step 1/9  loss ")
    assert lines[-1].startswith("epoch 3/3  step 9/9  loss ")
    assert lines[-1].endswith("  done")
    assert run.ranks[0].text().replace("\n", "").isprintable()
    assert run.ranks[1].text() == ""  # the other rank leaves the console alone


def check_the_logs(run):
    """A file a rank; what a rank warns of stands in its own, with the time and who says it."""
    logs = [(run.run_dir / name).read_text() for name in ("train.log", "train.rank1.log")]
    assert all("INFO train.loop: done: 9 steps" in log for log in logs)
    warned = [" WARNING pipelines.bad_samples: sample 11 " in log for log in logs]
    assert any(warned)
    assert ("WARNING: sample 11 " in run.ranks[0].text()) == warned[0]


def check_the_metrics(run_dir):
    """Every line has the same keys, and every step has a line."""
    records = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    assert [(record["step"], record["epoch"]) for record in records] == [(i + 1, i // 3) for i in range(9)]
    for record in records:
        assert {"step", "epoch", "lr", "loss", "images_per_sec", "data_wait"} <= record.keys()
        assert record.keys() == records[0].keys()
        assert 0.0 <= record["data_wait"] <= 1.0
        assert record["images_per_sec"] > 0.0


def check_the_terminal(received):
    """One line, drawn again and again, warnings above it, and its end."""
    assert received.startswith(("\repoch 1/2  step 1/6  loss ", "WARNING: sample 11 "))
    warnings, _, last = received.rpartition("\r\n")[0].rpartition("\r\n")
    assert all("WARNING: sample 11 " in line for line in warnings.split("\r\n"))
    assert last.rpartition("\r")[2].startswith("epoch 2/2  step 6/6  loss ")
    assert last.rstrip().endswith("  done")
    assert received.endswith("\r\n")
    assert "\x1b" not in received
