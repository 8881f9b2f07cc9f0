"""The training contest runs: each side in turns and to its end, judged by someone else, in a table and a picture."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.contestant import ContestantFailed, ContestantProcess
from benchmarks.training_accuracy import Accuracy, classify, encoder_of, encoder_of_run, representations
from benchmarks.training_contest import Contest, Outcome, hold
from benchmarks.training_figure import draw_contest, table
from benchmarks.training_twinview import Pace
from benchmarks.training_work import Script, lightly_contestant, settings_of, twinview_contestant
from model.build import build_method
from tests.benchmarks.training_cases import BATCH_SIZE, NUM_IMAGES, SIDE, raw_set, tiny
from tests.pipelines.betons import natural_image

pytest.importorskip("lightly", reason="the peer needs requirements-bench.txt")

PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return raw_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def config(beton, tmp_path):
    return tiny(beton, tmp_path)


@pytest.mark.parametrize("our_views", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_script_trains_for_its_epochs_and_leaves_its_encoder(config, tmp_path, our_views):
    before = encoder_of(settings_of(config).weights)
    weights = tmp_path / "encoder.pt"
    script = Script(threads=1, workers=0 if our_views else 1, our_views=our_views, weights=weights)
    contestant = lightly_contestant("lightly", config, NUM_IMAGES, 1, script)
    assert contestant.step == NUM_IMAGES // BATCH_SIZE * BATCH_SIZE
    with in_a_process(contestant) as process:
        process.turn(4 * contestant.step, PATIENCE_S)
        assert not weights.exists()
        process.turn(contestant.step, PATIENCE_S)
    after = torch.load(weights, weights_only=True)
    assert after.keys() == before.keys()
    assert (after["conv1.weight"] - before["conv1.weight"]).norm() > 1e-4


def test_our_run_tells_what_is_wrong_with_it(config):
    missing = replace(config, data=replace(config.data, path="nowhere.beton"))
    with pytest.raises(ValueError, match=r"nowhere\.beton: no such file"):
        Pace(total_steps=1).start(missing)


@pytest.mark.slow
def test_our_run_stands_still_between_turns_and_ends_with_the_last(config):
    """The whole of `train.run.train`: lines of metrics tell how far it has come."""
    steps_per_epoch = NUM_IMAGES // BATCH_SIZE
    contestant = twinview_contestant(
        "twinview", replace(config, train=replace(config.train, log_every=1)), NUM_IMAGES, 1
    )
    run_dir = Path(config.runs_dir, "twinview")
    with in_a_process(contestant) as process:
        assert not (run_dir / "metrics.jsonl").exists()
        for epochs in (1, 2, 2):
            process.turn(epochs * contestant.step, PATIENCE_S)
        with pytest.raises(ContestantFailed, match="the run is over"):
            process.turn(contestant.step, PATIENCE_S)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, config.train.epochs * steps_per_epoch + 1))
    encoder = encoder_of_run(run_dir)
    before = encoder_of(build_method(config.model, config.seed).state_dict())
    assert encoder.keys() == before.keys()
    assert (encoder["conv1.weight"] - before["conv1.weight"]).norm() > 1e-4


def test_the_table_has_a_line_for_each_training():
    lines = table(contest()).splitlines()
    assert lines[2] == "| 0 | at the start | | | 30.0% | 40.0% |"
    assert lines[3] == "| 0 | twinview | 500 | 2.00 | 45.0% | 50.0% |"
    assert lines[4] == "| 0 | lightly | 250 | 4.25 | 44.0% | 51.0% |"
    assert lines[-1] == (
        "3 epochs of 1,347 images, batch 256, 2 cores; ours is 2.00 times as fast. Accuracy on 450 test images."
    )


def contest():
    def outcome(name, rate, cpu, knn, linear):
        accuracy = Accuracy(knn=knn, linear=linear)
        return Outcome(
            contestant=name, seed=0, images_per_sec=rate, cpu_ms_per_image=cpu, seconds=9.0, accuracy=accuracy
        )

    return Contest(
        command="",
        num_images=1347,
        num_test=450,
        epochs=3,
        batch_size=256,
        cores=2,
        workers=2,
        start={0: Accuracy(knn=0.3, linear=0.4)},
        outcomes=[outcome("twinview", 500.0, 2.0, 0.45, 0.5), outcome("lightly", 250.0, 4.25, 0.44, 0.51)],
        speed_ratio=2.0,
        config="demo",
        environment={},
    )


@pytest.mark.slow
def test_a_contest_is_held(beton, tmp_path):
    """Same weights, same epochs, each judged by its own encoder; and drawn."""
    config = tiny(beton, tmp_path, "--train.epochs=3")
    found = hold(config, beton, [0], cores=1, workers=1)
    assert [(one.contestant, one.seed) for one in found.outcomes] == [("twinview", 0), ("lightly", 0)]
    assert (found.num_images, found.num_test, found.epochs) == (NUM_IMAGES, NUM_IMAGES, 3)
    assert found.start.keys() == {0}
    for one in found.outcomes:
        assert one.images_per_sec > 0
        assert one.cpu_ms_per_image > 0
        assert 0.0 <= one.accuracy.knn <= 1.0
        assert one.accuracy.linear > 0.5  # of two classes, on the images that it learned from
    draw_contest(found, tmp_path / "contest.png")
    with Image.open(tmp_path / "contest.png") as picture:
        assert picture.size == (1200, 480)


@contextmanager
def in_a_process(contestant):
    process = ContestantProcess(contestant)
    try:
        process.wait_for_setup()
        yield process
    finally:
        process.close()


def test_the_judge_is_right():
    """Two classes that a plane separates, and labels that mean nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    h = rng.normal(size=(400, 8)).astype(np.float32)
    h[:, 0] += 8 * labels - 4
    good = classify(h[:300], labels[:300], h[300:], labels[300:])
    assert min(good.knn, good.linear) > 0.97
    chance = classify(h[:300], rng.integers(2, size=300), h[300:], rng.integers(2, size=100))
    assert 0.3 < chance.knn < 0.7
    assert 0.3 < chance.linear < 0.7


def test_the_judge_sees_what_the_encoder_computes(config):
    method = build_method(config.model, config.seed).eval()
    images = [np.asarray(natural_image(SIDE, SIDE, i)) for i in range(7)]
    h = representations(encoder_of(method.state_dict()), settings_of(config), images)
    with torch.no_grad():
        expected = method.encoder(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-6)
