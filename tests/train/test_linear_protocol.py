"""`evaluate.py linear` against plain torch on the same views, and what it says of what it chose."""

import json
import logging
import math
from contextlib import closing, contextmanager
from dataclasses import replace
from shutil import rmtree

import pytest
import torch
from torch import nn

from model.build import build_method
from pipelines.augment import build_recipe
from pipelines.beton import open_beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.order import epoch_order
from tests.train.linear_cases import SIDE, TEST, TRAIN, make_case, options, pretraining
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.cli import RunFailed
from train.evaluation.features import features_of
from train.evaluation.linear_choice import hold_out
from train.evaluation.linear_config import LinearConfig
from train.evaluation.linear_probe import Head
from train.evaluation.linear_protocol import run_linear
from train.evaluation.linear_training import LinearTraining
from train.evaluation.protocol import PROTOCOLS, write_result

ONE_SAMPLE = 1.5 / TEST  # where a rounding tips the balance


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("linear"))


def config_of(case, **others):
    return LinearConfig(**options(case, **others))


def augmented_batches(case, seed, epochs):
    """h [N, D], labels and rows of every batch of every epoch, through an encoder that is built and loaded here."""
    config = pretraining()
    method = build_method(config.model, seed=0)
    method.load_state_dict(load_checkpoint(latest_checkpoint(case / "run")).model)
    encoder = method.encoder.eval()
    recipe = build_recipe(replace(config.augment, recipe="supervised"))
    loader = FFCVLoader(open_beton(case / "train.beton"), recipe, seed=seed, global_batch_size=16)
    with closing(loader), torch.no_grad():
        return [
            [(encoder(batch.views[0]), batch.labels, batch.sample_indices) for batch in loader.epoch(epoch)]
            for epoch in range(epochs)
        ]


def kept_batches(case, seed, epochs):
    """The same of representations of central views."""
    train = features_of(config_of(case), "train")
    orders = [torch.from_numpy(epoch_order(seed, epoch, TRAIN)) for epoch in range(epochs)]
    return [
        [(train.values[rows], train.labels[rows], rows) for rows in order[: TRAIN // 16 * 16].split(16)]
        for order in orders
    ]


def plain_torch(batches, base_lr, weight_decay=0.0, held_out=None):
    """`nn.Linear` from 0, by `torch.optim.SGD`, along half a cosine."""
    layer = nn.Linear(batches[0][0][0].shape[1], 5)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": weight_decay}, {"params": [layer.bias]}]
    peak, total, step = base_lr * 16 / 256, sum(map(len, batches)), 0
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    for epoch in batches:
        for x, labels, rows in epoch:
            kept = slice(None) if held_out is None else ~held_out[rows]
            for group in optimizer.param_groups:
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[kept]), labels[kept]).backward()
            optimizer.step()
            step += 1
    return layer


@torch.no_grad()
def accuracy(layer, x, labels):
    return float((layer(x).argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("kind", "batches_of"), [("streamed", augmented_batches), ("cached", kept_batches)])
def test_a_single_setting_is_what_torch_trains_on_the_same_views(case, kind, batches_of):
    config = config_of(case, features=kind, base_lrs=(8.0,), weight_decays=(1e-3,), seed=5, epochs=6)
    layer = plain_torch(batches_of(case, 5, 6), 8.0, 1e-3)
    trained = LinearTraining(config).train(config.settings, 5, None)
    torch.testing.assert_close(trained.heads.weight[0], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    result = run_linear(config)
    test = features_of(config, "test")
    (figure,) = result.figures["all"]
    assert figure.top1 == pytest.approx(accuracy(layer, test.values, test.labels), abs=ONE_SAMPLE)
    assert figure.top1 > 0.4, "twice as good as guessing, or nothing was learned"
    assert figure.num_samples == TEST
    assert result.chosen == {"base_lr": 8.0, "lr": 0.5, "weight_decay": 1e-3}
    assert result.chosen_by == "given in advance; trained on all training rows"
    assert result.tried[0]["validation_top1"] is None


def test_rows_that_were_held_out_choose_and_the_chosen_setting_learns_from_all(case):
    rates = (0.01, 8.0, 1.0)
    result = run_linear(config_of(case, features="cached", base_lrs=rates, val_fraction=0.3))
    batches, train = kept_batches(case, 0, 3), features_of(config_of(case), "train")
    held_out = hold_out(train.labels, 0.3, 0)
    layers = [plain_torch(batches, rate, held_out=held_out) for rate in rates]
    expected = [accuracy(layer, train.values[held_out], train.labels[held_out]) for layer in layers]
    found = [tried["validation_top1"] for tried in result.tried]
    assert found == pytest.approx(expected, abs=1.5 / int(held_out.sum()))
    best = max(range(3), key=found.__getitem__)
    assert found.count(max(found)) == 1, "one setting must be the best, or nothing is chosen"
    assert result.chosen["base_lr"] == rates[best]
    assert result.details["refitted_on_all_rows"] is True
    assert "on 30 of 100 training rows, held out of" in result.chosen_by
    test = features_of(config_of(case), "test")
    refitted = plain_torch(batches, rates[best])
    assert result.figures["all"][0].top1 == pytest.approx(accuracy(refitted, test.values, test.labels), abs=ONE_SAMPLE)


@pytest.mark.parametrize("cache", [False, True])
def test_as_many_kept_passes_as_epochs_are_the_stream(case, cache):
    streamed = config_of(case, base_lrs=(1.0,), epochs=2)
    kept = config_of(case, base_lrs=(1.0,), epochs=2, features="cached", augmented_epochs=2, cache=cache)
    ours, theirs = (LinearTraining(one).train(one.settings, 3, None).heads for one in (streamed, kept))
    torch.testing.assert_close(theirs.weight, ours.weight, rtol=1e-5, atol=1e-6)
    again = replace(kept, epochs=3)
    first, second = (LinearTraining(again).train(again.settings, 3, None).heads for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_seeds_are_trainings_of_their_own(case):
    setting = {"features": "cached", "base_lrs": (0.5,), "init_std": 0.5, "epochs": 1}
    both = run_linear(config_of(case, **setting, num_seeds=2, seed=8))
    alone = [run_linear(config_of(case, **setting, seed=seed)).figures["all"][0] for seed in (8, 9)]
    assert both.figures["all"] == alone
    assert both.seeds == {"all": [8, 9]}
    assert alone[0] != alone[1]
    config = config_of(case, **setting)
    starts = [config, replace(config, init_std=0.0)]
    first, second = (LinearTraining(one).train(one.settings, 8, None).heads.weight for one in starts)
    assert not torch.allclose(first, second), "weights start from what `init_std` says"


def test_what_diverges_is_named_and_not_chosen(case, caplog, tmp_path):
    config = config_of(case, features="cached", base_lrs=(1.0, 1e38), weight_decays=(1.0,), output_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        result = run_linear(config)
    assert result.chosen["base_lr"] == 1.0
    assert result.tried[1] == {
        "base_lr": 1e38,
        "lr": 1e38 / 16,
        "weight_decay": 1.0,
        "validation_top1": None,
        "train_loss": None,
        "diverged": True,
    }
    assert "the linear classifier of base learning rate 1e+38 and weight decay 1 has diverged" in caplog.text
    assert "the best base learning rate, 1, is at the edge of `base_lrs`: widen it" in caplog.text
    record = json.loads(write_result(result, config).read_text())
    assert record["accuracy"]["all"]["mean"] == result.figures["all"][0].top1
    with pytest.raises(RunFailed, match=r"all 1 linear classifiers have diverged, at .* from 1e\+38 to 1e\+38; set"):
        run_linear(config_of(case, features="cached", base_lrs=(1e38,), weight_decays=(1.0,)))


def test_files_of_other_feeds_have_other_names(case, tmp_path):
    feeds = [{}, {"features": "cached"}, {"features": "cached", "augmented_epochs": 1}]
    names = []
    for feed in feeds:
        config = config_of(case, base_lrs=(1.0,), epochs=1, output_dir=str(tmp_path), **feed)
        names.append(write_result(run_linear(config), config).name)
    assert names == ["linear-learned.json", "linear-learned-cached.json", "linear-learned-cached-augmented1.json"]


def test_pixels_and_layers_of_the_head_are_represented_too(case):
    for others, width in (({"representation": "pixels"}, 3 * SIDE * SIDE), ({"head_layers": -1}, 8)):
        config = config_of(case, base_lrs=(0.1,), epochs=1, **others)
        assert LinearTraining(config).train(config.settings, 0, None).heads.weight.shape == (1, 5, width)


def test_rows_held_out_are_a_share_of_every_class_and_depend_on_the_seed():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 3)
    held_out = hold_out(labels, 0.1, 0)
    assert [int((held_out & (labels == label)).sum()) for label in range(3)] == [4, 1, 1]
    assert torch.equal(held_out, hold_out(labels, 0.1, 0))
    assert not torch.equal(held_out, hold_out(labels, 0.1, 1))
    with pytest.raises(ValueError, match=r"leaves nothing to train on of class 1, which has 1 samples in `train_data`"):
        hold_out(torch.tensor([0, 0, 0, 1]), 0.1, 0)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"base_lrs": ()}, r"`base_lrs` must be a list of different finite numbers, each positive, got \[\]"),
        ({"base_lrs": (0.1, 0.1)}, r"`base_lrs` must be .* got \[0.1, 0.1\]"),
        ({"base_lrs": (0.1, math.nan)}, r"`base_lrs` must be"),
        ({"weight_decays": (-1.0,)}, r"`weight_decays` must be .* 0 or more, got \[-1.0\]"),
        ({"val_fraction": 0.0}, r"`val_fraction` must be between 0 and 1, got 0.0; to hold nothing out"),
        ({"augmented_epochs": 3}, r"`augmented_epochs` must be 0, or positive with `features` cached, got 3"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"epochs": 0}, r"`epochs` must be at least 1, got 0"),
        ({"features": "kept"}, r"`features` must be streamed or cached, got kept"),
        ({"init_std": -1.0}, r"`init_std` must be finite and not negative"),
    ],
)
def test_bad_settings_are_named(others, message):
    with pytest.raises(ValueError, match=message):
        LinearConfig(checkpoint="a", train_data="b", test_data="c", **others)


def test_batches_that_do_not_fit_are_named(case, monkeypatch):
    with pytest.raises(ValueError, match=r"`global_batch_size` must be .* at most 100, .* got 128"):
        LinearTraining(config_of(case, global_batch_size=128))
    config = config_of(case, global_batch_size=None)
    assert [config.batch_size_for(n, ranks) for n, ranks in ((10, 4), (5000, 2), (100_000, 8))] == [8, 256, 4096]
    with pytest.raises(ValueError, match=r"divisible by world size 3 and at most 100, .* got 16"):
        config_of(case).batch_size_for(100, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="`features` cached needs one process, got 2 ranks"):
        LinearTraining(config_of(case, features="cached"))


class CutOff(LinearTraining):
    """Ends with the first batch of an epoch; remembers which epochs were asked for."""

    def __init__(self, config, last_epoch):
        super().__init__(config)
        self.last_epoch, self.epochs = last_epoch, []

    @contextmanager
    def _feed(self, seed):
        with super()._feed(seed) as feed:
            whole = feed.epoch

            def epoch(number):
                self.epochs.append(number)
                if number > self.last_epoch:
                    raise KeyboardInterrupt
                return whole(number)

            feed.epoch = epoch
            yield feed


def test_a_stream_that_is_cut_off_goes_on_bit_for_bit(case, caplog):
    config = config_of(case, base_lrs=(0.5, 4.0), seed=17)
    heads = [Head(base_lr=0.5, weight_decay=0.0, skips_held_out=True), *config.settings]
    held_out = hold_out(torch.arange(TRAIN) % 5, 0.2, 0)
    whole = LinearTraining(config).train(heads, 17, held_out)
    rmtree(whole.unfinished.folder)
    with pytest.raises(KeyboardInterrupt):
        CutOff(config, 1).train(heads, 17, held_out)
    other = CutOff(config, 3)
    rmtree(other.train(heads, 18, held_out).unfinished.folder)
    assert other.epochs == [0, 1, 2], "another seed is another training"
    rest = CutOff(config, 3)
    found = rest.train(heads, 17, held_out)
    assert rest.epochs == [2]
    assert all(torch.equal(value, found.heads.state_dict()[name]) for name, value in whole.heads.state_dict().items())
    assert found.losses == whole.losses
    path = found.unfinished.path
    path.write_bytes(path.read_bytes()[:-9])
    anew = CutOff(config, 3)
    with caplog.at_level(logging.WARNING):
        anew.train(heads, 17, held_out)
    assert anew.epochs == [0, 1, 2]
    assert "the evaluation starts anew" in caplog.text
    rmtree(found.unfinished.folder)
    before = sorted(case.glob("run/evaluation/unfinished/*"))
    result = run_linear(config)
    assert sorted(case.glob("run/evaluation/unfinished/*")) != before, "until its result is written, it can go on"
    write_result(result, config)
    assert sorted(case.glob("run/evaluation/unfinished/*")) == before, "what is finished leaves nothing behind"


def test_it_is_the_subcommand_linear():
    assert PROTOCOLS["linear"].config_class is LinearConfig
    assert PROTOCOLS["linear"].run is run_linear
