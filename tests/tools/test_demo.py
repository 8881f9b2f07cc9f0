"""The demo, for real: in brief always, in full where there is time."""

import json
import sys

import pytest

from tests.train.runs import finish, start


def run_demo(folder, *overrides, timeout_s=290):
    data, runs = f"--data.path={folder}/data/train.beton", f"--runs_dir={folder}/runs"
    code, out, err = finish(start([sys.executable, "-m", "tools.demo", data, runs, *overrides]), timeout_s=timeout_s)
    assert code == 0, out + err
    return out, json.loads((folder / "runs" / "demo" / "summary.json").read_text())


def assert_summary_is_complete(summary):
    assert summary["images_per_sec"] > 0
    assert summary["train_seconds"] > 0
    assert set(summary["accuracy"]) == {"learned", "random", "pixels"}
    for figures in summary["accuracy"].values():
        assert 0.1 < figures["knn"] <= 1
        assert set(figures["linear"]) == {"1", "5", "20", "all"}
        assert figures["linear"]["1"] < figures["linear"]["all"]


@pytest.mark.distributed
def test_a_short_demo_goes_all_the_way(tmp_path):
    out, summary = run_demo(tmp_path, "--train.epochs=2", "--schedule.warmup_epochs=1")
    assert_summary_is_complete(summary)
    # What the pixels are worth does not depend on training: scikit-learn's digits are an easy set.
    assert summary["accuracy"]["pixels"]["linear"]["all"] > 0.95
    assert "learned encoder" in out
    report = (tmp_path / "runs" / "demo" / "report.html").read_text()
    assert f"{100 * summary['accuracy']['learned']['linear']['all']:.1f}" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert report.count("data:image/png;base64,") > 24  # two views of twelve images, and neighbours


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed
def test_the_demo_shows_what_the_method_is_for(tmp_path):
    _, summary = run_demo(tmp_path, timeout_s=880)
    assert_summary_is_complete(summary)
    learned, random, pixels = (summary["accuracy"][kind]["linear"] for kind in ("learned", "random", "pixels"))
    assert learned["5"] > pixels["5"] + 0.03
    assert learned["20"] > pixels["20"] + 0.02
    assert learned["5"] > random["5"] + 0.05
