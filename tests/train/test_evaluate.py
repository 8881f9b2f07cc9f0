"""`train/evaluate.py`: what it prints and writes is what scikit-learn says of the encoder's features; bad input is one
line."""

import json
import sys

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.pipelines.betons import make_beton
from tests.train.evaluated import evaluate, make_sets, save_run
from tests.train.runs import finish, start
from train.checkpoint import checkpoint_path
from train.evaluation.features import features_of
from train.evaluation.protocol import PROTOCOLS, EvaluationConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run beside the two labelled sets that it is evaluated on."""
    root = tmp_path_factory.mktemp("evaluated")
    make_sets(root)
    save_run(root / "run", step=4)
    save_run(root / "run", step=8, seed=8, average_seed=88)
    return root


def words(root, *options, run="run"):
    data = [f"--{split}_data={root}/{split}/set.beton" for split in ("train", "test")]
    return [f"--checkpoint={root / run}", *data, "--device=cpu", *options]


def features(root, split, **options):
    data = {f"{split}_data": str(root / split / "set.beton") for split in ("train", "test")}
    return features_of(EvaluationConfig(checkpoint=str(root / "run"), **data, device="cpu", **options), split)


def record(root, name):
    return json.loads((root / "run" / "evaluation" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "knn-learned"),
        ({"representation": "random"}, "knn-random"),
        ({"representation": "pixels"}, "knn-pixels"),
        ({"head_layers": -1}, "knn-learned-z"),
        ({"which": "best"}, "knn-learned-best"),
        ({"weights": "average"}, "knn-learned-average"),
    ],
)
def test_knn_is_what_scikit_learn_finds(root, capsys, options, name):
    flags = [f"--{option}={value}" for option, value in options.items()]
    assert evaluate("knn", *words(root, "--k=[1]", *flags)) == 0
    train, test = (features(root, split, **options) for split in ("train", "test"))
    judge = KNeighborsClassifier(1, metric="cosine").fit(train.values, train.labels)
    found = record(root, name)
    assert found["accuracy"]["all"] == {"mean": pytest.approx(judge.score(test.values, test.labels)), "std": 0.0}
    assert found["checkpoint"] == str(checkpoint_path(root / "run", 4 if "which" in options else 8))
    out = capsys.readouterr().out
    assert f"top-1 {100 * found['accuracy']['all']['mean']:.1f} %" in out
    assert f"written to {root / 'run' / 'evaluation' / name}.json" in out


def test_a_file_gives_the_options_and_words_after_it_override_them(root, tmp_path, capsys):
    file = tmp_path / "knn.yaml"
    file.write_text(
        f"checkpoint: {root}/run\ntrain_data: {root}/train/set.beton\ntest_data: {root}/test/set.beton\n"
        "k: [3, 5]\nlabels_per_class: [2]\nnum_seeds: 3\ndevice: cpu\n"
    )
    # A launcher puts its own option before the protocol.
    assert evaluate("--local_rank=0", "knn", f"--config={file}", "--k=[1]", f"--output_dir={tmp_path}") == 0
    found = json.loads((tmp_path / "knn-learned.json").read_text())
    assert found["k"] == [1]
    assert found["figures"]["2"]["num_seeds"] == 3
    out = capsys.readouterr().out
    assert "knn, learned,   2 labels a class: top-1" in out
    assert "knn, learned, all labels: top-1" in out
    assert "chosen: k 1, temperature 0.07; given in advance" in out


def test_the_script_itself_runs(root, tmp_path):
    command = [sys.executable, "train/evaluate.py", "knn", *words(root, "--k=[1]", f"--output_dir={tmp_path}")]
    code, out, err = finish(start(command))
    assert (code, err) == (0, "")
    assert out.endswith(f"written to {tmp_path}/knn-learned.json\n")


def test_help_lists_the_protocols_and_each_one_its_options(capsys):
    assert evaluate("--help") == 0
    out = capsys.readouterr().out
    assert list(PROTOCOLS) == ["knn", "linear", "logistic", "finetune", "transfer", "distill", "supervised"]
    for protocol in PROTOCOLS.values():
        assert f"  {protocol.name} " in out
        assert evaluate(protocol.name, "--help") == 0
        options = capsys.readouterr().out
        assert f"usage: evaluate.py {protocol.name} " in options
        assert "--test_data TEST_DATA" in options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=nowhere"], "there is no checkpoint nowhere"),
        (["--test_data=nowhere.beton"], "nowhere.beton"),
        (["--labels_per_class=[50]"], "labels per class must be between 1 and 16, the size of class 0, got 50"),
        (["--device=cuda"], "torch sees 0 GPUs"),
        (["--num_seeds=0"], "`num_seeds` must be at least 1, got 0"),
        (["--batch_size=0"], "`batch_size` must be at least 1, got 0"),
        (["--seed=-1"], "`seed` must be from 0 to 2**63 − 1, got -1"),
        (["--representation=best"], "`representation` must be one of"),
        (["--weights=average", "--representation=random"], "`weights` average needs `representation` learned, got ran"),
        (["--weights=average", "--which=best"], "step-000000004.safetensors holds no average"),
        (["--head_layers=1", "--representation=pixels"], "`head_layers` must be 0 with `representation` pixels, got 1"),
        (["--head_layers=-2"], "`head_layers` must be −1 (all) or more, got -2"),
        (["--head_layers=4"], "`head_layers` must be from 0 to 3, the layers of the projection head that"),
        (["--head_layer=1"], "there is no option `head_layer`; did you mean `head_layers`?"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--train_data="], "`train_data` must name a .beton or a folder with one folder for each class, got nothing"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(root, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert evaluate("knn", *words(root, "--k=[1]", "--cache=false", *options)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["knnn"],
            "the first argument must be one of knn, linear, logistic, finetune, transfer, distill, supervised, ",
        ),
        (["knnn"], "got knnn; did you mean knn?"),
        (["--checkpoint=a"], "got --checkpoint=a; `evaluate.py --help` explains them"),
        (["--local_rank", "0"], "got none; `evaluate.py --help` explains them"),
        (["knn"], "the following arguments are required: checkpoint, train_data, test_data"),
    ],
)
def test_a_protocol_that_there_is_not_gets_one_line_too(capsys, given, message):
    assert evaluate(*given) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert message in err


def test_measuring_on_what_was_learned_from_is_warned_of(root, tmp_path, caplog):
    same = f"--test_data={root}/train/set.beton"
    assert evaluate("knn", *words(root, "--k=[1]", same, f"--output_dir={tmp_path}")) == 0
    assert "`test_data` is `train_data`" in caplog.text
    assert json.loads((tmp_path / "knn-learned.json").read_text())["accuracy"]["all"]["mean"] == 1.0


def test_sets_of_other_classes_are_refused_by_the_first_that_differs(root, tmp_path, capsys):
    make_beton(tmp_path, [(24, 20)] * 6, encode="raw", num_classes=3)
    assert evaluate("knn", *words(root, f"--test_data={tmp_path}/set.beton")) == 2
    assert f"label 3 is None in {tmp_path}/set.beton and class3 in" in capsys.readouterr().err


def test_features_of_something_else_in_the_cache_end_in_one_line(root, tmp_path, capsys):
    run = tmp_path / "run"
    for seed in (4, 5):
        save_run(run, seed=seed)
        assert evaluate("knn", *words(root, "--k=[1]", f"--checkpoint={run}")) == 0
    folder = run / "evaluation" / "features"
    content = max(folder.iterdir()).read_bytes()
    for path in folder.iterdir():
        path.write_bytes(content)
    capsys.readouterr()
    save_run(run, seed=4)
    codes = {evaluate("knn", *words(root, "--k=[1]", f"--checkpoint={run}"))}
    save_run(run, seed=5)
    codes.add(evaluate("knn", *words(root, "--k=[1]", f"--checkpoint={run}")))
    assert codes == {2}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("must hold features of" in line and line.endswith("remove it") for line in lines)
