"""The JSON of an evaluation: what it says, and that none takes the place of another one's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, t

from tests.train.evaluated import make_sets, save_run
from train.checkpoint import checkpoint_path
from train.evaluation.classification import measure
from train.evaluation.knn_protocol import KNNConfig
from train.evaluation.protocol import EvaluationConfig, Protocol, evaluate
from train.evaluation.results import Result, sha256_of, write_result


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    make_sets(root)
    for step, score in ((4, 0.5), (8, 0.75)):
        save_run(root / "run", step=step, score=score)
    return root


@pytest.fixture
def config(root, tmp_path):
    data = {f"{split}_data": str(root / split / "set.beton") for split in ("train", "test")}
    return EvaluationConfig(checkpoint=str(root / "run"), **data, output_dir=str(tmp_path))


def metrics(hits):
    """Of 24 samples of 4 classes, the first `hits` right and the others one class beside it."""
    labels = torch.arange(24) // 6
    predicted = torch.where(torch.arange(24) < hits, labels, (labels + 1) % 4)
    return measure(torch.nn.functional.one_hot(predicted, 4).float(), labels, 4)


def test_a_record_says_what_was_measured_and_on_what(root, config):
    chosen = {"l2": 0.5}
    result = Result(
        protocol="logistic",
        figures={"5": [metrics(12), metrics(18), metrics(15)], "all": [metrics(20)]},
        seeds={"5": [3, 4, 5]},
        chosen=chosen,
        chosen_by="top-1 on a tenth of the training set",
        tried=[chosen, {"l2": 1.0}],
        details={"iterations": 17},
    )
    record = json.loads(write_result(result, config).read_text())
    path = checkpoint_path(root / "run", 8)
    assert record["checkpoint"] == str(path)
    assert record["checkpoint_step"] == 8
    assert record["checkpoint_sha256"] == sha256_of(path)
    assert record["data"]["train"]["sha256"] == sha256_of(root / "train" / "set.beton")
    assert record["data"]["test"]["num_samples"] == 24
    assert (record["chosen"], record["tried"], record["details"]) == (chosen, [chosen, {"l2": 1.0}], {"iterations": 17})
    top1 = np.array([12, 18, 15]) / 24
    assert record["accuracy"]["5"] == pytest.approx({"mean": top1.mean(), "std": top1.std(ddof=1)})
    assert record["accuracy"]["all"] == {"mean": pytest.approx(20 / 24), "std": 0.0}
    five = record["figures"]["5"]
    assert five["top1"]["by_seed"] == top1.tolist()
    assert five["seeds"] == [3, 4, 5]
    low, high = t.interval(0.95, 2, loc=top1.mean(), scale=top1.std(ddof=1) / 3**0.5)
    assert five["top1"]["confidence_interval"] == pytest.approx([low, high])
    assert five["interval"] == {"level": 0.95, "kind": "student_t"}
    assert five["per_class"]["2"] == {"count": 6, "accuracy": pytest.approx((0 + 1 + 0.5) / 3)}
    every = record["figures"]["all"]
    wilson = binomtest(20, 24).proportion_ci(0.95, method="wilson")
    assert every["top1"]["confidence_interval"] == pytest.approx([wilson.low, wilson.high])
    assert every["interval"]["kind"] == "wilson"
    assert every["top5"]["mean"] == 1.0
    assert torch.__version__.startswith(record["versions"]["torch"])


def test_an_interval_of_a_share_stays_within_0_and_1(config):
    result = Result(protocol="knn", figures={"1": [metrics(24), metrics(12)]})
    record = json.loads(write_result(result, config).read_text())
    assert record["figures"]["1"]["top1"]["confidence_interval"] == [0.0, 1.0]


def test_no_result_takes_the_place_of_another_ones(root, config):
    result = Result(protocol="knn", figures={"all": [metrics(20)]})
    file = str(checkpoint_path(root / "run", 4))
    written = [
        write_result(replace(result, suffix=suffix), replace(config, **change))
        for change, suffix in (
            ({}, ""),
            ({"which": "best"}, ""),
            ({"checkpoint": file}, ""),
            ({"weights": "average"}, ""),
            ({"representation": "random"}, ""),
            ({"head_layers": 1}, ""),
            ({"head_layers": -1}, ""),
            ({"test_data": config.train_data}, ""),
            ({}, "10%"),
            ({}, "a/b c"),
        )
    ]
    names = [path.name for path in written]
    assert names[:7] == [
        "knn-learned.json",
        "knn-learned-best.json",
        "knn-learned-step-000000004.json",
        "knn-learned-average.json",
        "knn-random.json",
        "knn-learned-head1.json",
        "knn-learned-z.json",
    ]
    assert names[7].startswith("knn-learned-")
    assert names[8:] == ["knn-learned-10%.json", "knn-learned-a_b_c.json"]
    assert len(set(names)) == len(list(written[0].parent.iterdir())) == 10
    assert json.loads(written[0].read_text())["data"]["test"]["num_samples"] == 24
    assert write_result(result, config) == written[0]  # of the same, the later one stays
    assert write_result(result, replace(config, test_data=config.train_data)) == written[7]


def test_other_options_keep_apart(config, tmp_path):
    result = Result(protocol="knn", figures={"all": [metrics(20)]})
    options = {name: getattr(config, name) for name in EvaluationConfig.__dataclass_fields__}
    of_7 = KNNConfig(**options, k=(7,), labels_per_class=(1,))
    of_20 = KNNConfig(**options, k=(20,))
    written = [write_result(result, one) for one in (of_20, of_7, replace(of_20, seed=3))]
    assert written[0].name == "knn-learned.json"
    assert len(set(written)) == 3
    assert json.loads(written[0].read_text())["k"] == [20]
    assert write_result(result, replace(of_7, batch_size=8, device="cpu", cache=False)) == written[1]  # move no figure


def test_what_an_evaluation_would_go_on_from_goes_when_its_result_is_written(config, tmp_path):
    (tmp_path / "unfinished").mkdir()
    result = Result(protocol="linear", figures={"all": [metrics(20)]}, leftovers=[tmp_path / "unfinished"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_result(result, replace(config, output_dir=str(tmp_path / "file")))
    assert (tmp_path / "unfinished").exists()
    write_result(result, config)
    assert not (tmp_path / "unfinished").exists()


def test_runs_that_share_a_folder_of_results_keep_apart(root, config, tmp_path):
    result = Result(protocol="knn", figures={"all": [metrics(20)]})
    save_run(tmp_path / "other")
    first = write_result(result, config)
    second = write_result(result, replace(config, checkpoint=str(tmp_path / "other")))
    assert first != second
    assert json.loads(first.read_text())["checkpoint"] == str(checkpoint_path(root / "run", 8))


def test_by_default_it_lies_in_the_run(root, config):
    config = replace(config, output_dir=None)
    result = Result(protocol="knn", figures={"all": [metrics(20)]})
    assert write_result(result, config) == root / "run" / "evaluation" / "knn-learned.json"
    elsewhere = replace(result, folder=root / "elsewhere")
    assert write_result(elsewhere, config) == root / "elsewhere" / "knn-learned.json"


def test_an_evaluation_stays_with_the_checkpoint_that_it_began_with(root, config, tmp_path, monkeypatch):
    save_run(tmp_path / "run", step=4)
    before = []

    def run(asked):
        assert asked.checkpoint == str(checkpoint_path(tmp_path / "run", 4))
        save_run(tmp_path / "run", step=8)  # training goes on meanwhile, and removes its older checkpoints
        before.append(sha256_of(Path(asked.checkpoint)))
        Path(asked.checkpoint).unlink()
        return Result(protocol="knn", figures={"all": [metrics(20)]})

    protocol = Protocol(
        name="knn", help="", module="results", config_name="", run_name="run_of_this_test", supports_ranks=False
    )
    monkeypatch.setattr("train.evaluation.results.run_of_this_test", run, raising=False)
    _, path = evaluate(protocol, replace(config, checkpoint=str(tmp_path / "run")))
    assert path.name == "knn-learned.json"
    record = json.loads(path.read_text())
    assert (record["checkpoint_step"], record["checkpoint_sha256"]) == (4, before[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder, got the file .*file; name another one"):
        evaluate(protocol, replace(config, checkpoint=str(tmp_path / "run"), output_dir=str(tmp_path / "file")))
    assert len(before) == 1, "refused before anything is computed"


def test_several_ranks_are_refused_where_one_process_does_the_work(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    protocol = Protocol(name="knn", help="", module="results", config_name="", run_name="", supports_ranks=False)
    with pytest.raises(
        ValueError, match=r"`evaluate.py knn` must run in one process, got 2 ranks; start it by `python`"
    ):
        evaluate(protocol, config)
