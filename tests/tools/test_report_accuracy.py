"""The tables of a run's evaluations: their rows as they are read, from files that evaluations wrote."""

from dataclasses import replace

import pytest
import torch

from tests.tools.reported import Page
from tests.train.evaluated import make_sets, save_run
from tools.report_accuracy import accuracy_tables, best_record, compared, read_evaluations, short_name
from train.checkpoint import checkpoint_path
from train.evaluation.classification import measure
from train.evaluation.protocol import EvaluationConfig
from train.evaluation.results import Result, write_result


@pytest.fixture
def config(tmp_path):
    make_sets(tmp_path, counts=(12, 8), num_classes=4)
    save_run(tmp_path / "run", step=4, average_seed=5)
    data = {f"{split}_data": str(tmp_path / split / "set.beton") for split in ("train", "test")}
    return EvaluationConfig(checkpoint=str(tmp_path / "run"), **data)


def metrics(hits):
    labels = torch.arange(8) // 2
    predicted = torch.where(torch.arange(8) < hits, labels, (labels + 1) % 4)
    return measure(torch.nn.functional.one_hot(predicted, 4).float(), labels, 4)


def rows(page):
    """The cells of every row, table after table."""
    return Page(page).rows


def tables(folder):
    return accuracy_tables(*read_evaluations(folder))


def test_every_evaluation_has_its_rows(config, tmp_path):
    folder = tmp_path / "run" / "evaluation"
    assert "Not evaluated yet" in tables(folder)
    few = Result(
        protocol="knn",
        figures={"all": [metrics(8)], "1": [metrics(4), metrics(6)]},
        chosen={"k": 20},
        chosen_by="leaving one <out>",
    )
    write_result(few, config)
    write_result(Result(protocol="finetune", figures={"10%": [metrics(6)]}, suffix="10%"), config)
    write_result(
        Result(protocol="knn", figures={"all": [metrics(5)]}), replace(config, weights="average", head_layers=-1)
    )
    (folder / "other.json").write_text('{"format": "of someone else"}')
    by_chosen = "k 20; leaving one <out>"
    assert rows(tables(folder))[:9] == [
        ["protocol, representation", "10%", "1", "all"],
        ["finetune, learned, 10%", "75.0 ± 0.0", "", ""],
        ["knn, learned, average of the weights, z", "", "", "62.5 ± 0.0"],
        ["knn, learned", "", "62.5 ± 17.7", "100.0 ± 0.0"],
        ["protocol, representation", "labels", "seeds", "top-1", "95 % interval", "top-5", "mean per class", "chosen"],
        ["finetune, learned, 10%", "10% of the labels", "1", "75.0", "40.9 to 92.9", "100.0", "75.0", ""],
        ["knn, learned, average of the weights, z", "all labels", "1", "62.5", "30.6 to 86.3", "100.0", "62.5", ""],
        ["knn, learned", "all labels", "1", "100.0", "67.6 to 100.0", "100.0", "100.0", by_chosen],
        ["knn, learned", "  1 label a class", "2", "62.5", "0.0 to 100.0", "100.0", "62.5", by_chosen],
    ]


def test_evaluations_of_several_checkpoints_and_sets_are_told_apart(config, tmp_path):
    result = Result(protocol="knn", figures={"all": [metrics(8)]})
    save_run(tmp_path / "run", step=8)
    write_result(result, config)
    write_result(result, replace(config, checkpoint=str(checkpoint_path(tmp_path / "run", 4))))
    write_result(result, replace(config, test_data=config.train_data))
    names = [row[0] for row in rows(tables(tmp_path / "run" / "evaluation"))[1:4]]
    test, train = config.test_data, config.train_data
    assert sorted(names) == sorted(
        [f"knn, learned, step 8, on {train}", f"knn, learned, step 4, on {test}", f"knn, learned, step 8, on {test}"]
    )


def test_evaluations_with_other_options_are_told_apart(config, tmp_path):
    result = Result(protocol="knn", figures={"all": [metrics(8)]})
    write_result(result, config)
    write_result(result, replace(config, seed=3))
    write_result(result, replace(config, representation="random", seed=3))
    names = [row[0] for row in rows(tables(tmp_path / "run" / "evaluation"))[1:4]]
    assert sorted(names) == ["knn, learned, seed 0", "knn, learned, seed 3", "knn, random"]


def test_the_accuracy_of_each_class(config, tmp_path):
    write_result(Result(protocol="knn", figures={"all": [metrics(6)]}), config)
    found = rows(tables(tmp_path / "run" / "evaluation"))
    assert found[-5:] == [["class", "knn, learned"], ["0", "100.0"], ["1", "100.0"], ["2", "100.0"], ["3", "0.0"]]


def test_runs_beside_each_other(config, tmp_path):
    write_result(Result(protocol="knn", figures={"all": [metrics(6)], "1": [metrics(4)]}), config)
    write_result(Result(protocol="finetune", figures={"10%": [metrics(8)]}, suffix="10%"), config)
    write_result(Result(protocol="knn", figures={"all": [metrics(8)]}), replace(config, representation="random"))
    records, problems = read_evaluations(tmp_path / "run" / "evaluation")
    assert not problems
    knn = [record for record in records if record["protocol"] == "knn"]
    assert rows(compared(["a", "b"], [records, knn])) == [
        ["evaluation", "a", "b"],
        ["finetune, learned, 10%, 10% of the labels", "100.0 ± 0.0", "–"],
        ["knn, learned, all labels", "75.0 ± 0.0", "75.0 ± 0.0"],
        ["knn, learned, 1 label a class", "50.0 ± 0.0", "50.0 ± 0.0"],
        ["knn, random, all labels", "100.0 ± 0.0", "100.0 ± 0.0"],
    ]
    assert short_name(best_record(records)) == "knn"  # the learned one, from all labels
    assert best_record(records)["representation"] == "learned"
    assert "None of these runs is evaluated yet" in compared(["a"], [[]])


def test_a_damaged_file_is_named(config, tmp_path):
    path = write_result(Result(protocol="knn", figures={"all": [metrics(8)]}), config)
    path.write_text(path.read_text()[:-9])
    records, problems = read_evaluations(path.parent)
    assert records == []
    assert problems == [f"{path} must be the JSON of an evaluation, got a damaged file; evaluate again"]
    assert "knn-learned.json must be the JSON of an evaluation" in accuracy_tables(records, problems)
