"""Pictures: the numbers behind them against other people's formulas, the same bytes twice, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipelines.beton import open_beton
from tests.pipelines.betons import make_beton
from tests.tools.encoder_checkpoints import write_checkpoint
from tests.train.runs import TINY
from tools import pictures, pictures_confusion, pictures_curves, pictures_embedding, pictures_neighbours
from tools import pictures_spectrum as spectrum
from tools.convert import convert
from tools.image_encoding import EncodeOptions
from tools.pictures_source import Source, SourceConfig, balanced_rows, shown_classes
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.cli import run
from train.config import CONFIG_FILE, parse_pretrain_config, resolved_dict

NUM, NUM_CLASSES = 24, 3
TINY_ENCODER = {"side": 16, "depth": 10, "width": 0.125, "stem": "cifar"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with one checkpoint, and a labelled set."""
    folder = tmp_path_factory.mktemp("pictures")
    make_beton(folder, [(18 + i % 3, 18) for i in range(NUM)], num_classes=NUM_CLASSES, encode="raw")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    write_checkpoint(folder / "run" / "checkpoints" / "step-000000012.safetensors", **TINY_ENCODER)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """h and z, and labels."""
    source = Source(SourceConfig(checkpoint=str(folder / "run"), test_data=str(folder / "set.beton"), device="cpu"))
    return *source.both(), source.labels


def draw(folder, name, *words, out=None):
    """Write a picture; returns its numbers, the picture and the bytes of both."""
    given = ["--test_data", str(folder / "set.beton")] if "--test_data" not in words else []
    options = [] if out is None else ["--out", str(out)]
    path = pictures.write(
        *pictures.parse_picture(
            [name, "--checkpoint", str(folder / "run"), "--device", "cpu", *given, *options, *map(str, words)]
        )
    )
    text = path.with_suffix(".json").read_bytes()
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert "Software" not in image.info
    return json.loads(text), path, path.read_bytes() + text


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("embedding", "--perplexity", 4), "embedding-tsne"),
        (("neighbours", "--num_queries", 3, "--k", 2), "neighbours-h"),
        (("confusion",), "confusion-knn"),
        (("spectrum",), "spectrum"),
    ],
)
def test_the_same_options_give_the_same_bytes_beside_the_run_or_elsewhere(folder, tmp_path, words, name):
    if words == ("confusion",):
        words = (*words, "--train_data", folder / "set.beton")
    numbers, path, first = draw(folder, *words)
    assert path == folder / "run" / "pictures" / f"{name}.png"
    assert numbers["step"] == 12
    assert draw(folder, *words, "--cache", "false", out=tmp_path)[2] == first
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]


def test_principal_components_are_scikit_learns_of_a_balanced_sample(folder, both):
    numbers, _, _ = draw(folder, "embedding", "--method", "pca", "--num_images", 18)
    rows = numbers["rows"]
    assert rows == sorted(rows)
    assert np.bincount(both[2][rows]).tolist() == [6, 6, 6]
    assert numbers["labels"] == both[2][rows].tolist()
    for name, values in zip("hz", both[:2], strict=True):
        unit = values[rows] / np.linalg.norm(values[rows], axis=1, keepdims=True)
        pca = PCA(2, svd_solver="covariance_eigh").fit(unit.astype(np.float64))
        theirs, ours = pca.transform(unit), np.array(numbers["points"][name])
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-6)  # signs are free
        np.testing.assert_allclose(
            numbers["figures"][name]["variance_shares"], pca.explained_variance_ratio_, rtol=1e-5
        )


def test_tsne_keeps_groups_together_and_depends_on_its_seed():
    rng = np.random.default_rng(0)
    centers = 6 * np.eye(3, 10).repeat(20, 0)
    values = (centers + rng.normal(0, 0.5, centers.shape)).astype(np.float32)
    config = {"checkpoint": "", "test_data": "", "perplexity": 8.0}
    planes = [
        pictures_embedding.lay_out(values, pictures_embedding.EmbeddingConfig(**config, seed=seed)).points
        for seed in (0, 0)
    ]
    assert np.array_equal(*planes)
    distances = np.linalg.norm(planes[0][:, None] - planes[0], axis=-1) + 1e9 * np.eye(60)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


def test_neighbours_are_those_of_a_float64_search_and_never_the_query(folder, both):
    h, _, labels = both
    numbers, _, _ = draw(folder, "neighbours", "--num_queries", 5, "--k", 4)
    unit = h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    right = []
    assert np.bincount([labels[q["row"]] for q in numbers["queries"]]).tolist() in ([2, 2, 1], [2, 1, 2], [1, 2, 2])
    for query in numbers["queries"]:
        expected = np.argsort(-cosines[query["row"]], kind="stable")[:4]
        assert [one["row"] for one in query["neighbours"]] == expected.tolist()
        np.testing.assert_allclose(
            [one["cosine"] for one in query["neighbours"]], cosines[query["row"]][expected], 1e-5
        )
        right += [one["class"] == query["class"] for one in query["neighbours"]]
    assert numbers["share_right"] == pytest.approx(np.mean(right))


def test_copies_of_a_query_are_its_neighbours_and_itself_is_none():
    values = torch.ones(6, 4)
    found, cosines = pictures_neighbours.nearest_others(values, np.array([1, 5]), 3)
    assert found.tolist() == [[0, 2, 3], [0, 1, 2]]
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-6)


def test_a_picture_shows_the_central_square_of_the_image(folder):
    source = Source(SourceConfig(checkpoint=str(folder / "run"), test_data=str(folder / "set.beton"), device="cpu"))
    stored = open_beton(folder / "set.beton").encoded(2).reshape(18, 20, 3)
    assert np.array_equal(np.asarray(source.image(2)), stored[:, 1:19])
    files = sorted((folder / "images").glob("*/*.png"))
    from_files = Source(SourceConfig(checkpoint=str(folder / "run"), test_data=str(folder / "images"), device="cpu"))
    with Image.open(files[2]) as image:
        assert np.array_equal(np.asarray(from_files.image(2)), np.asarray(image)[:, 1:19])


def test_confusions_are_counted_by_hand_for_scikit_learns_regression(folder, both):
    h, _, labels = both
    # The first half of the same images, half of them with the label of another class: so some are mistaken.
    (folder / "other").mkdir()
    make_beton(folder / "other", [(18 + i % 3, 18) for i in range(NUM // 2)], num_classes=NUM_CLASSES, encode="raw")
    train_labels = np.arange(NUM_CLASSES).repeat(NUM // 2 // NUM_CLASSES)
    scaler = StandardScaler().fit(h[: NUM // 2])
    model = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(h[: NUM // 2]), train_labels)
    predicted = model.predict(scaler.transform(h))
    assert 0 < (predicted == labels).sum() < NUM
    words = ("confusion", "--classifier", "logistic", "--train_data", folder / "other" / "set.beton")
    numbers, _, _ = draw(folder, *words)
    expected = [[sum(predicted[labels == i] == j) for j in range(NUM_CLASSES)] for i in range(NUM_CLASSES)]
    assert numbers["counts"] == expected
    assert numbers["accuracy"] == pytest.approx((predicted == labels).mean())


def test_the_largest_confusions_are_shares_of_the_true_class():
    counts = np.array([[8, 2, 0], [0, 100, 30], [1, 0, 0]])
    assert pictures_confusion.largest_confusions(counts) == [(2, 0), (1, 2), (0, 1)]


def test_spectra_are_those_of_matrices_whose_spectra_are_known():
    turn = np.array([[3.0, -4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 0.0, 2.0]])  # 3 ± 4i, and 2
    np.testing.assert_allclose(spectrum.squared_real_eigenvalues(turn), [9.0, 9.0, 4.0])
    np.testing.assert_allclose(spectrum.squared_singular_values(turn), [25.0, 25.0, 4.0])
    assert spectrum.effective_rank(np.ones(7)) == pytest.approx(7.0)
    assert spectrum.effective_rank(np.array([5.0, 0.0])) == pytest.approx(1.0)
    assert spectrum.effective_rank(np.zeros(2)) == 0.0


def test_the_spectrum_is_of_the_heads_weights_and_of_both_covariances(folder, both):
    numbers, _, _ = draw(folder, "spectrum")
    (path,) = (folder / "run" / "checkpoints").iterdir()
    weight = load_checkpoint(path).model["projection_head.layers.0.0.weight"].double()
    eigenvalues = torch.linalg.eigvals(weight).real.square().sort(descending=True).values
    np.testing.assert_allclose(numbers["first_layer"]["values"], eigenvalues, rtol=1e-6, atol=1e-12)
    assert numbers["first_layer"]["values_are"] == "squared real parts of eigenvalues"
    assert [layer["shape"] for layer in numbers["squared_singular_values"]] == [[64, 64], [128, 64]]
    for name, values in zip("hz", both[:2], strict=True):
        unit = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float64)
        variances = PCA(svd_solver="full").fit(unit).explained_variance_
        ours = np.array(numbers["covariance"][name]["eigenvalues"])
        np.testing.assert_allclose(ours[: NUM - 1], variances[: NUM - 1], rtol=1e-6)
        shares = variances[: NUM - 1] / variances[: NUM - 1].sum()
        assert numbers["covariance"][name]["effective_rank"] == pytest.approx(np.exp(stats.entropy(shares)), rel=1e-6)


def test_many_classes_are_thinned_out_evenly_and_named_ones_are_taken():
    labels, names = np.arange(100).repeat(3), [f"c{i}" for i in range(100)]
    assert shown_classes(labels, (), names) == list(range(0, 100, 5))
    assert shown_classes(labels, ("c7", "c3"), names) == [3, 7]
    rows = balanced_rows(labels, [3, 7], 5, seed=0)
    assert labels[rows].tolist() == [3, 3, 7, 7]


def make_run(folder, name, seed, losses, *words, step=10):
    config = parse_pretrain_config([*TINY, f"--name={name}", f"--seed={seed}", "--data.path=x", *words])
    (folder / name).mkdir()
    (folder / name / CONFIG_FILE).write_text(yaml.safe_dump(resolved_dict(config)))
    lines = [{"step": step * (i + 1), "epoch": 0.0, "loss": loss} for i, loss in enumerate(losses)]
    (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder / name)


def test_curves_are_grouped_by_what_is_not_chance_with_students_interval(tmp_path):
    values = np.random.default_rng(0).normal(3.0, 1.0, (3, 4))
    runs = [make_run(tmp_path, f"a{i}", i, row.tolist()) for i, row in enumerate(values)]
    runs.append(make_run(tmp_path, "b", 0, [5.0, 4.0], "--model.temperature=0.2", "--train.log_every=7"))
    with (tmp_path / "a0" / "metrics.jsonl").open("a") as file:  # a step that the others have not reached
        file.write(json.dumps({"step": 50, "loss": 9.0}) + "\n")
    path = pictures.write(*pictures.parse_picture(["curves", "--runs", *runs]))
    assert path == tmp_path / "a0" / "pictures" / "curves.png"
    numbers = json.loads(path.with_suffix(".json").read_text())
    assert numbers["groups"] == {"temperature 0.5": runs[:3], "temperature 0.2": runs[3:]}
    band = numbers["curves"]["loss"]["temperature 0.5"]
    low, high = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values, axis=0))
    assert band["step"] == [10, 20, 30, 40]
    np.testing.assert_allclose(band["mean"], values.mean(0))
    np.testing.assert_allclose(band["half_width"], (high - low) / 2)
    assert numbers["curves"]["loss"]["temperature 0.2"]["half_width"] is None
    labelled = [f"mine={run}" for run in runs]
    groups = pictures_curves.group_runs([pictures_curves.read_run(word) for word in labelled])
    assert [len(members) for members in groups.values()] == [4]


def test_what_cannot_be_shown_is_refused_in_a_line_and_nothing_is_written(folder, tmp_path):
    one = make_run(tmp_path, "one", 0, [1.0])
    other = make_run(tmp_path, "other", 1, [1.0], step=7)
    out = tmp_path / "out"
    headless = tmp_path / "headless.safetensors"
    (path,) = (folder / "run" / "checkpoints").iterdir()
    whole = load_checkpoint(path)
    encoder = {name: tensor for name, tensor in whole.model.items() if name.startswith("encoder.")}
    save_checkpoint(headless, Checkpoint(model=encoder, config=whole.config))
    convert(folder / "images" / "class0", tmp_path / "unlabelled.beton", EncodeOptions(encode="raw"), workers=1)
    single = folder / "single"
    (single / "class0").mkdir(parents=True, exist_ok=True)
    for file in (folder / "images" / "class0").iterdir():
        (single / "class0" / file.name).write_bytes(file.read_bytes())
    refused = {
        ("embedding", "--num_images", 999): "`num_images` must be from 3 to 24",
        ("embedding", "--num_images", 2): "`num_images` must be from 3 to 24",
        ("embedding", "--num_images", 9, "--perplexity", 9): "`perplexity` must be below the 9 images",
        ("embedding", "--classes", "class0", "cat"): "got 'cat'; it has class0, class1, class2",
        ("embedding", "--checkpoint", headless): "must hold the whole projection head.* got 0 of its 2",
        ("embedding", "--test_data", tmp_path / "unlabelled.beton"): "must have a label for every image",
        ("embedding", "--test_data", single): "must have at least two classes",
        ("neighbours", "--k", 24): "`k` must be at most 23",
        ("neighbours", "--num_queries", 25): "`num_queries` must be at most 24",
        ("neighbours", "--num_queries", 2, "--k", 2, "--space", "z", "--checkpoint", headless): "whole projection head",
        ("spectrum", "--test_data", "", "--checkpoint", headless): "whole projection head",
        ("confusion", "--train_data", single): "class",
    }
    for words, message in refused.items():
        with pytest.raises(ValueError, match=message):
            draw(folder, *words, out=out)
    curves = {
        (one, other): "must have steps in common",
        (one, one): "must name each run once",
        (f"a={one}", other): "must all have labels or none",
        (one, "--metrics", "knn_accuracy"): "has no knn_accuracy, but loss",
        (str(tmp_path),): "holds no config.yaml",
    }
    for words, message in curves.items():
        with pytest.raises(ValueError, match=message):
            pictures.write(*pictures.parse_picture(["curves", "--out", str(out), "--runs", *words]))
    (tmp_path / "one" / "metrics.jsonl").write_text(json.dumps({"step": 1, "lr": 0.5}) + "\n")
    with pytest.raises(ValueError, match="must have a metric in common"):
        pictures.write(*pictures.parse_picture(["curves", "--out", str(out), "--runs", one, other]))
    assert not out.exists()


def test_the_command_says_so_in_one_line_with_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pictures", "curves", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run(pictures.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no config.yaml; give the directory of a run\n"
