"""`evaluate.py knn` and `logistic` on a tiny checkpoint: what they write is what scikit-learn finds on its features."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pipelines.subset import balanced_subset
from tests.train.evaluated import evaluate, make_sets, save_run
from train.evaluation.features import features_of
from train.evaluation.few_shot_linear import fit_scores, standardize
from train.evaluation.knn_protocol import KNNConfig
from train.evaluation.logistic_protocol import LogisticConfig, hold_out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbours")
    make_sets(folder, counts=(64, 24))
    make_sets(folder / "other", counts=(40, 8))
    save_run(folder / "run")
    return folder


@pytest.fixture
def words(root):
    return {
        "checkpoint": str(root / "run"),
        "train_data": str(root / "train/set.beton"),
        "test_data": str(root / "test/set.beton"),
    }


@pytest.fixture
def call(root, words, tmp_path):
    """Evaluate; returns the exit code and the record."""

    def start(protocol, *options, file=None):
        base = [f"--{name}={value}" for name, value in words.items()]
        code = evaluate(protocol, *base, "--device=cpu", f"--output_dir={tmp_path}", *options)
        path = tmp_path / f"{file or protocol}-learned.json" if "fixed" not in str(options) else None
        path = path or tmp_path / f"{protocol}-learned-fixed.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return start


@pytest.fixture
def sets(words):
    return [features_of(KNNConfig(**words), split) for split in ("train", "test")]


def test_knn_reports_every_setting_and_the_first_is_the_headline(call, sets):
    code, record = call("knn", "--k=[3,40]", "--temperature=[0.07,1.0]", "--labels_per_class=[2]", "--num_seeds=3")
    assert code == 0
    train, test = sets

    def judge(rows, k, temperature):
        peer = KNeighborsClassifier(
            min(k, len(rows)), metric="cosine", weights=lambda d: np.exp((1 - d.astype(np.float64)) / temperature)
        ).fit(train.values[rows].double(), train.labels[rows])
        return peer.score(test.values.double(), test.labels)

    every = np.arange(64)
    assert record["chosen"] == {"k": 3, "temperature": 0.07}
    assert record["chosen_by"] == "given in advance: the first of `k` and of `temperature`"
    assert record["accuracy"]["all"] == {"mean": pytest.approx(judge(every, 3, 0.07)), "std": 0.0}
    subsets = [balanced_subset(train.labels, 2, seed).numpy() for seed in range(3)]
    few = [judge(rows, 3, 0.07) for rows in subsets]
    assert record["accuracy"]["2"]["mean"] == pytest.approx(np.mean(few))
    assert record["accuracy"]["2"]["std"] == pytest.approx(np.std(few, ddof=1))
    found = {(one["k"], one["temperature"]): one["figures"] for one in record["details"]["settings"]}
    assert list(found) == [(3, 0.07), (3, 1.0), (40, 0.07), (40, 1.0)]
    for setting, figures in found.items():
        assert figures["all"]["top1"] == pytest.approx(judge(every, *setting))
    assert found[40, 1.0]["2"]["top1"] == pytest.approx(np.mean([judge(rows, 40, 1.0) for rows in subsets]))


def test_logistic_chooses_on_held_out_samples_and_fits_again(call, sets, words):
    code, record = call("logistic", "--num_penalties=5", "--penalty_range=[1e-4,1]", "--val_fraction=0.25")
    assert code == 0
    train, test = sets
    held_out = hold_out(train.labels, 0.25, 0).numpy()
    assert [int(held_out[train.labels == label].sum()) for label in range(4)] == [4] * 4

    def judge(rows, penalty):
        options = {"C": 1 / (penalty * int(rows.sum())), "tol": 1e-10, "max_iter": 100_000}
        return LogisticRegression(**options).fit(train.values[rows].double(), train.labels[rows])

    penalties = LogisticConfig(**words, num_penalties=5, penalty_range=(1e-4, 1.0)).penalties
    expected = [
        judge(~held_out, penalty).score(train.values[held_out].double(), train.labels[held_out])
        for penalty in penalties
    ]
    assert penalties == pytest.approx([1, 0.1, 0.01, 0.001, 0.0001])
    assert [one["penalty"] for one in record["tried"]] == penalties
    assert [one["validation_top1"] for one in record["tried"]] == pytest.approx(expected)
    best = penalties[int(np.argmax(expected))]
    assert record["chosen"] == {"penalty": best}
    final = judge(np.ones(64, bool), best)
    assert record["accuracy"]["all"]["mean"] == pytest.approx(final.score(test.values.double(), test.labels))
    assert record["details"]["num_samples"] == 64
    assert record["details"]["num_validation_samples"] == 16


def test_logistic_with_a_validation_set_of_its_own(call, root, sets, words):
    other = str(root / "other/train/set.beton")
    options = ["--num_penalties=3", "--penalty_range=[1e-2,1]", f"--val_data={other}"]
    code, record = call("logistic", *options)
    assert code == 0
    train, _ = sets
    held = features_of(KNNConfig(**words | {"test_data": other}), "test")
    expected = [
        LogisticRegression(C=1 / (penalty * 64), tol=1e-10, max_iter=100_000)
        .fit(train.values.double(), train.labels)
        .score(held.values.double(), held.labels)
        for penalty in (1.0, 0.1, 0.01)
    ]
    assert [one["validation_top1"] for one in record["tried"]] == pytest.approx(expected)
    assert record["details"]["num_samples"] == 64 + 40
    assert other in record["chosen_by"]


def test_the_fixed_penalty_is_the_classifier_for_few_labels(call, sets):
    code, record = call("logistic", "--penalty=fixed", "--labels_per_class=[1,5]", "--num_seeds=2")
    assert code == 0
    train, test = sets
    train_x, test_x = standardize(train.values, test.values)
    for amount in ("1", "5"):
        accuracies = []
        for seed in range(2):
            rows = balanced_subset(train.labels, int(amount), seed)
            found = fit_scores(train_x[rows], train.labels[rows], test_x, 4).argmax(dim=1)
            accuracies.append(float((found == test.labels).double().mean()))
        assert record["accuracy"][amount]["mean"] == pytest.approx(np.mean(accuracies))
    assert record["details"]["penalties"]["5"] == [pytest.approx(1 / (10 * 20))] * 2
    assert record["tried"] == []


def test_few_labels_are_split_too(call):
    code, record = call("logistic", "--labels_per_class=[4]", "--num_seeds=2", "--num_penalties=2", "--val_fraction=.5")
    assert code == 0
    assert len(record["details"]["penalties"]["4"]) == 2
    assert set(record["accuracy"]) == {"4", "all"}


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("knn", ["--k=[0]"], "`k` must be one or more numbers from 1 on, each once, got [0]; usual: [20]"),
        ("knn", ["--k=[20,200]"], "`k` must not exceed the 64 samples of"),
        ("knn", ["--temperature=[0.0]"], "`temperature` must be one or more finite numbers above 0, each once, got [0"),
        ("knn", ["--k=[5]", "--labels_per_class=[50]"], "labels per class must be between 1 and 16, the size of class"),
        ("logistic", ["--penalty_range=[1,1e-3]"], "the smaller first, got [1, 0.001]; the paper's are [1e-6, 1e5]"),
        ("logistic", ["--num_penalties=1"], "`num_penalties` must be 1 just where both ends of `penalty_range` are"),
        ("logistic", ["--val_fraction=1"], "`val_fraction` must be above 0 and below 1, got 1.0; usual: 0.1"),
        (
            "logistic",
            ["--val_fraction=0.99"],
            "`val_fraction` 0.99 leaves no sample to learn from of class 0, which has",
        ),
        ("logistic", ["--labels_per_class=[1]"], "`labels_per_class` must be at least 2 each with `penalty` search"),
        ("logistic", ["--penalty=best"], "`penalty`"),
        ("logistic", ["--val_data={test}"], "`val_data` must be another set than `test_data`, got"),
        ("logistic", ["--val_data={few}"], "`val_data` must have the classes of `train_data`, but label 3 is"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(call, root, capsys, protocol, options, message):
    if any("{few}" in option for option in options) and not (root / "few").exists():
        make_sets(root / "few", counts=(3, 3), num_classes=3)
    capsys.readouterr()
    places = {"test": root / "test/set.beton", "few": root / "few/train/set.beton"}
    code, record = call(protocol, *(option.format(**places) if "{" in option else option for option in options))
    assert code == 2
    assert record is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
