"""Metrics in both files, through kills, resumes and numbers that JSON does not know."""

import json
import math
import re
import resource
import time
from contextlib import contextmanager

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.metrics import METRICS_FILE, MetricsWriter, parse_line, read_metrics


def lines(run_dir):
    """Those of the file, without their time."""
    return [
        re.sub(r', "time": \d+\.\d{1,3}}$', "}", line) for line in (run_dir / METRICS_FILE).read_text().splitlines()
    ]


def curve(run_dir, name):
    """What TensorBoard shows."""
    events = EventAccumulator(str(run_dir)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_same_numbers_reach_both_files(tmp_path):
    run_dir = tmp_path / "runs" / "a"
    with MetricsWriter(run_dir) as writer:
        writer.write(1, {"loss": torch.tensor(5.5), "lr": 0.1 + 0.2})
        writer.write(2, {"loss": torch.tensor([4.25], dtype=torch.bfloat16), "lr": 3})
    assert lines(run_dir) == [
        '{"step": 1, "loss": 5.5, "lr": 0.30000000000000004}',
        '{"step": 2, "loss": 4.25, "lr": 3.0}',
    ]
    assert read_metrics(run_dir) == [
        {"step": 1, "loss": 5.5, "lr": 0.1 + 0.2},
        {"step": 2, "loss": 4.25, "lr": 3.0},
    ]
    assert curve(run_dir, "loss") == [(1, 5.5), (2, 4.25)]


def test_each_line_ends_with_the_time_at_which_it_was_written(tmp_path):
    before = time.time()
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 5.5})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    record = parse_line(line)
    assert list(record) == ["step", "loss", "time"]
    assert before - 1e-3 <= record["time"] <= time.time() + 1e-3
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.5}]


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    strict = json.loads(lines(tmp_path)[0], parse_constant=pytest.fail)
    assert strict == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_line_can_be_read_while_the_writer_is_open(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 5.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.0}]
        assert curve(tmp_path, "loss") == [(1, 5.0)]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": float(step)})
            if step == 20:
                writer.write(step, {"knn": 0.5})
    with MetricsWriter(tmp_path, resume_step=20) as writer:
        assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 20]
        for step in (30, 40, 50):
            writer.write(step, {"loss": step + 0.5})
    assert read_metrics(tmp_path) == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 20, "knn": 0.5},
        {"step": 30, "loss": 30.5},
        {"step": 40, "loss": 40.5},
        {"step": 50, "loss": 50.5},
    ]
    assert curve(tmp_path, "loss") == [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5), (50, 50.5)]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20, "loss": 1', "2", "{}", "\0\0\0"])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path, torn):
    (tmp_path / METRICS_FILE).write_text('{"step": 10, "loss": 1.0}\n' + torn)
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 1.0}]
    with MetricsWriter(tmp_path, resume_step=20) as writer:
        writer.write(30, {"loss": 2.0})
    assert lines(tmp_path) == ['{"step": 10, "loss": 1.0}', '{"step": 30, "loss": 2.0}']


def test_a_disabled_writer_touches_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": torch.empty((), device="meta")})  # is not even read
    assert not (tmp_path / "run").exists()


@contextmanager
def no_file_longer_than(num_bytes):
    """The kernel cuts a write off there and refuses the next, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 10])
def test_a_disk_that_is_full_ends_the_run_with_whole_lines(tmp_path, room):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 40):
            writer.write(step, {"loss": 0.1 + step})
        length = (tmp_path / METRICS_FILE).stat().st_size
        with no_file_longer_than(length + room), pytest.raises(OSError) as caught:
            writer.write(40, {"loss": 40.25})
        reason = "No space left on device" if room else "File too large"
        assert str(caught.value) == (
            f"{tmp_path}: metrics of step 40 cannot be written ({reason}); make room and start the same command again: "
            "it resumes from the last checkpoint"
        )
        assert (tmp_path / METRICS_FILE).stat().st_size == length
    with MetricsWriter(tmp_path, resume_step=30) as writer:
        writer.write(31, {"loss": 31.1})
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 32))


def test_the_configuration_is_text_in_tensorboard(tmp_path):
    with MetricsWriter(tmp_path, resolved={"name": "a", "optim": {"base_lr": 0.3}}) as writer:
        writer.write(1, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "```yaml\nname: a\noptim:\n  base_lr: 0.3\n```"


def test_it_can_be_closed_twice_and_is_closed_by_an_error(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ZeroDivisionError), writer:
        writer.write(1, {"loss": 1 / 0})
    writer.close()


def test_only_single_numbers_are_written(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises((ValueError, RuntimeError)):
        writer.write(1, {"loss": torch.ones(2)})
    assert lines(tmp_path) == []
