"""Regressions are told from noise and from other machines, and files that cannot be compared in one line."""

import dataclasses
import json

import pytest

from benchmarks.compare import changes, main, report
from benchmarks.harness import Ratio, Row
from benchmarks.results import Results, read_results, write_results
from train.cli import run

MACHINE = {"device": "EPYC", "cores": 4, "load": 0.5, "commit": "a" * 40, "torch": "2.15.0"}


def row(work, contestant, median, unit="images/s", spread=0.02):
    return Row(
        work=work,
        contestant=contestant,
        median=median,
        unit=unit,
        spread=spread,
        cpu_s_per_item=0.1,
        peak_mib=1.0,
        repeats=5,
    )


def ratio(work, value, spread=0.02, second="peer"):
    return Ratio(work=work, first="ours", second=second, ratio=value, spread=spread, rounds=5, floor=1.0, goal=3.0)


def results(crop=4.0, crop_median=1000.0, loss=8.0, loss_median=0.5, spread=0.02, **environment):
    return Results(
        rows=[
            row("crop", "ours", crop_median, spread=spread),
            row("crop", "peer", 250.0),
            row("loss", "ours", loss_median, "s", spread),
            row("loss", "peer", 4.0, "s"),
        ],
        ratios=[ratio("crop", crop, spread), ratio("loss", loss, spread)],
        environment=MACHINE | environment,
        settings={"workers": 4},
        images=["334 of imagenet-sample.tar"],
    )


def verdicts(old, new, tolerance=0.1):
    return {(change.work, change.figure): change.verdict(tolerance) for change in changes(old, new)}


def test_ratios_and_our_own_medians_are_compared_on_an_equal_machine():
    assert verdicts(results(), results()) == {
        ("crop", "ours / peer"): "",
        ("loss", "ours / peer"): "",
        ("crop", "ours"): "",
        ("loss", "ours"): "",
    }


def test_what_became_slower_and_what_faster():
    # 4 → 3 is a quarter less, 0.5 s → 0.4 s is a quarter faster; 8 → 7.3 is within a tenth.
    found = changes(results(), results(crop=3.0, loss=7.3, loss_median=0.4))
    by_name = {(change.work, change.figure): change for change in found}
    assert by_name["crop", "ours / peer"].share == pytest.approx(-0.25)
    assert by_name["crop", "ours / peer"].verdict(0.1) == "slower"
    assert by_name["crop", "ours / peer"].verdict(0.3) == ""
    assert by_name["loss", "ours / peer"].verdict(0.1) == ""
    assert by_name["loss", "ours"].share == pytest.approx(0.25)
    assert by_name["loss", "ours"].verdict(0.1) == "faster"
    slower = changes(results(), results(loss_median=0.625))[-1]
    assert (slower.share, slower.verdict(0.1)) == (pytest.approx(-0.2), "slower")


def test_a_change_within_the_spread_is_no_regression():
    noisy = verdicts(results(spread=0.3), results(crop=3.0, spread=0.4))
    assert noisy["crop", "ours / peer"] == "within the spread"  # 4 ± 0.6 and 3 ± 0.6 overlap
    assert verdicts(results(spread=0.2), results(crop=3.0, spread=0.2))["crop", "ours / peer"] == "slower"


@pytest.mark.parametrize("environment", [{"device": "Xeon"}, {"cores": 2}, {"gpus": "H100 (80 GiB)"}])
def test_on_another_machine_ratios_alone_are_compared(environment):
    found = verdicts(results(), results(crop_median=100.0, **environment))
    assert found == {("crop", "ours / peer"): "", ("loss", "ours / peer"): ""}


def test_other_workers_are_another_machine():
    fewer = dataclasses.replace(results(crop_median=100.0), settings={"workers": 2})
    assert ("crop", "ours") not in verdicts(results(), fewer)
    untold = dataclasses.replace(results(), settings={})
    assert verdicts(untold, results(crop_median=100.0))["crop", "ours"] == "slower"


def test_the_table_tells_of_both_files_and_of_what_differs():
    old, new = results(), dataclasses.replace(results(crop=3.0, torch="2.16.0"), images=["96 of others"])
    new = dataclasses.replace(new, rows=[*new.rows, row("new_work", "ours", 1.0)])
    lines = report(old, new, changes(old, new), 0.1).splitlines()
    assert lines[:2] == [f"{which}: 4 cores of EPYC, load 0.5, commit aaaaaaaaaaaa" for which in ("old", "new")]
    assert "torch: 2.15.0, now 2.16.0" in lines
    assert "other images: 334 of imagenet-sample.tar; now 96 of others" in lines
    assert "only in the new file: new_work" in lines
    assert next(line.split() for line in lines if "slower" in line) == [
        *("crop", "ours", "/", "peer", "4.00×", "3.00×", "-25.0%", "1.8%", "slower")
    ]
    assert lines[-1] == "4 figures: 1 slower by more than 10%, 0 faster"


def command_of(main, monkeypatch, capsys, *arguments):
    """Exit code, output and complaint."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    out = capsys.readouterr()
    return stopped.value.code, out.out, out.err


def command(monkeypatch, capsys, *arguments):
    return command_of(main, monkeypatch, capsys, *arguments)


def test_the_exit_code_tells_of_regressions(tmp_path, monkeypatch, capsys):
    write_results(tmp_path / "old.json", results())
    write_results(tmp_path / "new.json", results(crop=3.0))
    pair = (tmp_path / "old.json", tmp_path / "new.json")
    assert command(monkeypatch, capsys, *pair)[0] == 1
    assert command(monkeypatch, capsys, *pair, "--tolerance", "0.3")[0] == 0
    assert command(monkeypatch, capsys, *reversed(pair))[0] == 0  # faster


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file; expected one that a benchmark wrote"),
        ("", "not whole, or no JSON"),
        ('{"environment": {}, "rows": [', "not whole, or no JSON"),
        ('{"study": "head", "rows": {}}', "not a benchmark's result: expected an object with"),
        ("[1, 2]", "not a benchmark's result"),
        ('{"environment": {}, "rows": {"name": "x"}}', "`rows` must be of type list, got {'name': 'x'}"),
        ('{"environment": {}, "rows": [3]}', "rows[0] must be an object, got 3"),
        ('{"environment": {}, "rows": [{"work": "crop"}]}', "rows[0] lacks `contestant`, `median`"),
        ('{"environment": {}, "rows": [], "format": "other"}', "expected format `twinview-benchmark` 1, got `other` 1"),
        ('{"environment": {}, "rows": [], "format_version": 2}', "got `None` 2; read it with the program that"),
        ("row:median=NaN", "rows[0].median must be a finite number, got nan"),
        ("row:median=0", "rows[0].median must be positive, got 0"),
        ('row:spread="wide"', "rows[0].spread must be a finite number, got 'wide'"),
        ('row:unit="hours"', "`unit` must be one of images/s, steps/s, s, got 'hours'"),
        ("row:colour=1", "rows[0] has the unknown field `colour`"),
        ('row:unit="s"', "`crop` must be measured in the same unit in both files, got images/s and s"),
        ('row:work="other"', "both files must hold results of the same benchmarks, got crop and 1 more and other"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, monkeypatch, capsys, content, complaint):
    write_results(tmp_path / "old.json", results())
    if content is not None and content.startswith("row:"):
        name, _, value = content.removeprefix("row:").partition("=")
        changed = dataclasses.asdict(row("crop", "ours", 1.0)) | {name: json.loads(value)}
        content = json.dumps({"environment": {}, "rows": [changed]})
    if content is not None:
        (tmp_path / "new.json").write_text(content)
    code, out, err = command(monkeypatch, capsys, tmp_path / "old.json", tmp_path / "new.json")
    assert (code, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_a_tolerance_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, "a.json", "b.json", "--tolerance", "3")
    assert (code, err) == (2, "error: `--tolerance` must be at least 0 and less than 1, got 3.0\n")


def test_files_come_back_as_they_were_written(tmp_path):
    written = results()
    write_results(tmp_path / "new.json", written)
    assert read_results(tmp_path / "new.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_ratios_of_older_files_are_those_of_the_medians(tmp_path):
    old = {"environment": MACHINE, "rows": [dataclasses.asdict(one) for one in results().rows]}
    for one in old["rows"]:
        del one["gpu_peak_mib"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = read_results(tmp_path / "old.json").ratios
    assert [(one.work, one.first, one.second, one.ratio) for one in found] == [
        ("crop", "ours", "peer", 4.0),  # 1000 images/s against 250
        ("loss", "ours", "peer", 8.0),  # 0.5 s against 4
    ]
    assert found[0].spread == pytest.approx(0.02 * 2**0.5)
    assert found[0].goal is None
