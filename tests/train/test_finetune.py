"""Fine-tuning: where it starts, what its steps are, what is measured, and what is refused. Real runs of few steps."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.build import build_method
from model.resnet import EncoderConfig
from pipelines.augment import build_recipe, center_recipe
from pipelines.build import DataConfig, Subset, build_loader, open_data
from pipelines.manifest import load_manifest
from pipelines.subset import SubsetConfig, choose_rows
from tests.reliability.forked import Forked, run_script, variables_of
from tests.train.evaluated import CONFIG, evaluate, make_sets, save_run
from train.checkpoint import Checkpoint, checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from train.cli import RunInterrupted
from train.config import TrainConfig, config_from_dict, resolved_dict
from train.evaluation.finetune import FinetuneConfig, run_finetune, training_of
from train.evaluation.labelled_data import open_labelled
from train.evaluation.network_accuracy import load_network, network_accuracy, network_scores
from train.evaluation.transfer import TransferConfig, run_transfer
from train.metrics import MetricsWriter
from train.optim.lars import peak_lr
from train.runtime import free_port

CPU = torch.device("cpu")
RUN = replace(
    CONFIG,
    data=DataConfig(path="set.beton", num_threads=1),
    augment=replace(CONFIG.augment, crop_area=(0.4, 1.0), mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25)),
    train=TrainConfig(device="cpu", precision="fp32", cpu_threads=1, log_every=1, ema_decay=0.9, keep_every_epochs=1),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny pretrained run in `run/` beside the two labelled sets."""
    root = tmp_path_factory.mktemp("finetuned")
    make_sets(root)
    save_run(root / "run", config=RUN)
    return root


@pytest.fixture(scope="module")
def pretrained(root):
    return load_checkpoint(latest_checkpoint(root / "run"))


def asked(root, output_dir, **changes):
    data = {name: str(root / name.split("_")[0] / "set.beton") for name in ("train_data", "test_data")}
    options = {"checkpoint": str(root / "run"), "global_batch_size": 16, "epochs": 1, "batch_size": 10}
    return FinetuneConfig(**data | options | {"output_dir": str(output_dir)} | changes)


def finetuned(result):
    return load_checkpoint(latest_checkpoint(Path(result.details["runs"][0])))


@pytest.mark.parametrize("head_layers", [0, 1])
def test_it_starts_at_the_checkpoint(root, pretrained, tmp_path, head_layers):
    ours = finetuned(run_finetune(asked(root, tmp_path, head_layers=head_layers, base_lr=0.0))).model
    parameters = dict(build_method(config_of(tmp_path).model, 0).named_parameters())  # statistics move at any rate
    kept = [name for name in parameters if not name.startswith("classifier.")]
    assert any(name.startswith("projection_head.layers.0.") for name in kept) == (head_layers == 1)
    assert not any(name.startswith("projection_head.layers.1.") for name in kept)
    for name in kept:
        assert torch.equal(ours[name], pretrained.model[name])
    assert ours["classifier.weight"].std() == pytest.approx(0.01, rel=0.3)
    assert not ours["classifier.bias"].any()


def config_of(folder):
    """The configuration of the one run in a folder."""
    (path,) = folder.glob("*/checkpoints")
    return config_from_dict(load_checkpoint(latest_checkpoint(path.parent)).config)


def test_from_the_middle_of_the_head_logits_are_those_of_plain_torch(root, tmp_path):
    result = run_finetune(asked(root, tmp_path, head_layers=1, recipe="v2"))
    state, (network, _) = finetuned(result).model, load_network(Path(result.details["runs"][0]))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layer = {name.removeprefix("projection_head.layers.0."): tensor for name, tensor in state.items()}
    h = F.linear(network.encoder(x), layer["0.weight"])
    h = F.batch_norm(h, layer["1.running_mean"], layer["1.running_var"], layer["1.weight"], layer["1.bias"], eps=1e-5)
    expected = F.linear(F.relu(h), state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(network.logits(x), expected, rtol=1e-5, atol=1e-6)


def training_batches(config):
    """Views and labels of every step, as the run's configuration says."""
    loader = build_loader(
        config.data,
        open_data(config.data),
        build_recipe(config.augment),
        seed=config.seed,
        rank=0,
        world_size=1,
        device=CPU,
        dtype=torch.float32,
        num_cores=1,
    )
    for epoch in range(config.train.epochs):
        yield from loader.epoch(epoch)
    loader.close()


def test_the_steps_of_v1_are_a_plain_torch_loop(root, pretrained, tmp_path):
    options = {"epochs": 2, "base_lr": 0.4, "labels": SubsetConfig(fraction=0.5, seed=3), "seed": 5}
    ours = finetuned(run_finetune(asked(root, tmp_path, **options))).model
    config = config_of(tmp_path)
    method = build_method(config.model, 5)
    encoder = {name: tensor for name, tensor in pretrained.model.items() if name.startswith("encoder.")}
    assert not method.load_state_dict(encoder, strict=False).unexpected_keys
    method = method.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    labels = open_labelled(str(root / "train" / "set.beton"), "train").labels
    rows = set(choose_rows(SubsetConfig(fraction=0.5, seed=3), labels, None, 64).tolist())
    steps = list(training_batches(config))
    assert len(steps) == 4
    for step, batch in enumerate(steps):
        assert set(batch.sample_indices.tolist()) <= rows
        optimizer.param_groups[0]["lr"] = 0.4 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        F.cross_entropy(method.logits(batch.views[0]), batch.labels).backward()
        optimizer.step()
    expected = method.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_what_the_papers_state_is_the_default():
    def trained(share=0.1, encoder=RUN.model.encoder, **options):
        config = FinetuneConfig(checkpoint="c", train_data="a", test_data="b", **options)
        return training_of(config, encoder, share=share)

    v1 = trained(global_batch_size=4096)
    assert (v1.optim.name, v1.optim.nesterov, v1.optim.momentum, v1.optim.weight_decay) == ("sgd", True, 0.9, 0.0)
    assert peak_lr(v1.optim, 4096) == pytest.approx(0.8)
    assert (trained(share=0.01).epochs, v1.epochs, trained(share=1.0).epochs) == (60, 30, 30)
    assert (v1.schedule.warmup_epochs, v1.schedule.decay) == (0.0, "cosine")
    options = {"recipe": "v2", "global_batch_size": 1024}
    assert (trained(**options).optim.name, trained(**options).optim.weight_decay) == ("lars", 0.0)
    assert peak_lr(trained(**options).optim, 1024) == pytest.approx(0.16)
    for larger in (EncoderConfig(width=2.0), EncoderConfig(selective_kernel=True)):
        assert peak_lr(trained(encoder=larger, **options).optim, 1024) == pytest.approx(0.064)


def test_a_run_takes_the_network_and_the_views_and_leaves_the_rest(root, tmp_path):
    run_finetune(asked(root, tmp_path, base_lr=0.0))
    config = config_of(tmp_path)
    assert config.model.encoder == RUN.model.encoder
    assert (config.augment.recipe, config.augment.size, config.augment.crop_area) == ("supervised", 16, (0.4, 1.0))
    assert (config.augment.mean, config.augment.std) == (RUN.augment.mean, RUN.augment.std)
    assert (config.model.method, config.model.classifier.num_classes) == ("supervised", 4)
    assert (config.train.ema_decay, config.train.keep_every_epochs) == (0.0, 0)


def scores_one_by_one(run_dir, data):
    """Logits of every image of a set, by itself."""
    network, config = load_network(run_dir)
    loader = build_loader(
        DataConfig(path=str(data), global_batch_size=1),
        open_data(DataConfig(path=str(data))),
        center_recipe(config.augment),
        seed=0,
        rank=0,
        world_size=1,
        device=CPU,
        dtype=torch.float32,
        num_cores=1,
        training=False,
    )
    with torch.inference_mode():
        found = [(network.logits(batch.views[0]), batch.labels) for batch in loader.epoch(0)]
    loader.close()
    return torch.cat([scores for scores, _ in found]), torch.cat([labels for _, labels in found])


def test_the_command_writes_the_accuracy_of_the_last_epoch(root, tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in vars(asked(root, tmp_path)).items() if name in COMMON]
    code = evaluate("finetune", *options, "--labels.per_class=6", "--num_seeds=2", "--epochs=4", "--base_lr=2")
    assert code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "finetune-learned-6-batch16-epochs4-lr2.json").read_text())
    figures = record["figures"]["6"]
    assert (record["protocol"], figures["num_seeds"], figures["seeds"]) == ("finetune", 2, [0, 1])
    assert "last epoch" in record["chosen_by"]
    assert record["details"]["num_labelled"] == [24, 24]
    for top1, run_dir in zip(figures["top1"]["by_seed"], record["details"]["runs"], strict=True):
        scores, labels = scores_one_by_one(Path(run_dir), root / "test" / "set.beton")
        assert top1 == pytest.approx((scores.argmax(dim=1) == labels).double().mean().item())
    subsets = [load_checkpoint(latest_checkpoint(Path(run))).loader["subset"] for run in record["details"]["runs"]]
    assert subsets[0] != subsets[1]
    assert "6 labels a class: top-1" in capsys.readouterr().out


COMMON = ("checkpoint", "train_data", "test_data", "global_batch_size", "batch_size", "output_dir")


def test_rows_and_ranks_share_a_set_out(root, tmp_path):
    run_dir = Path(run_finetune(asked(root, tmp_path)).details["runs"][0])
    data = open_labelled(str(root / "test" / "set.beton"), "test")
    scores, labels = scores_one_by_one(run_dir, data.path)
    rows = np.array([0, 3, 4, 11, 17, 18, 23])
    some = network_accuracy(run_dir, data, num_classes=4, batch_size=3, rows=rows)
    assert some.num_samples == 7
    assert some.top1 == pytest.approx((scores.argmax(dim=1) == labels)[rows].double().mean().item())
    network, config = load_network(run_dir)
    parts = []
    for rank in range(3):
        loader = build_loader(
            DataConfig(path=data.path, global_batch_size=4),
            Subset(data.data, rows),
            center_recipe(config.augment),
            seed=0,
            rank=rank,
            world_size=3,
            device=CPU,
            dtype=torch.float32,
            num_cores=1,
            training=False,
        )
        parts.append(network_scores(network, loader, 7, 4, CPU, rows=rows))
        loader.close()
    torch.testing.assert_close(sum(parts), scores[rows], rtol=1e-5, atol=1e-6)
    assert (torch.stack(parts) != 0).any(dim=2).sum(dim=0).eq(1).all()  # each by one rank


def test_the_same_command_goes_on(root, tmp_path, monkeypatch):
    config = asked(root, tmp_path / "stopped", epochs=3)
    whole = finetuned(run_finetune(replace(config, output_dir=str(tmp_path / "whole"))))
    write = MetricsWriter.write

    def write_and_be_stopped(self, step, line):
        write(self, step, line)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", write_and_be_stopped)
        with pytest.raises(RunInterrupted, match="stopped by SIGTERM after step 6"):
            run_finetune(config)
    resumed = finetuned(run_finetune(config))
    assert resumed.position["step"] == whole.position["step"] == 12
    assert all(torch.equal(resumed.model[name], tensor) for name, tensor in whole.model.items())
    last = latest_checkpoint(Path(run_finetune(config).details["runs"][0]))  # a third time it is only measured
    assert torch.equal(load_checkpoint(last).model["classifier.weight"], whole.model["classifier.weight"])


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(root, tmp_path):
    config = asked(root, tmp_path / "one", base_lr=0.4)
    alone, port = run_finetune(config), free_port()
    options = [f"--{name}={value}" for name, value in vars(asked(root, tmp_path / "two")).items() if name in COMMON]
    words = ["train/evaluate.py", "finetune", *options, "--epochs=1", "--base_lr=0.4"]
    ranks = [Forked(tmp_path / f"output-{rank}", variables_of(rank, 2, port), run_script, words) for rank in range(2)]
    try:
        assert [rank.end() for rank in ranks] == [0, 0], ranks[0].text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    (result,) = (tmp_path / "two").glob("*.json")
    record = json.loads(result.read_text())
    (run_dir,) = record["details"]["runs"]
    ours, theirs = load_checkpoint(latest_checkpoint(Path(run_dir))).model, finetuned(alone).model
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in theirs)
    scores, labels = scores_one_by_one(Path(run_dir), root / "test" / "set.beton")
    top1 = (scores.argmax(dim=1) == labels).double().mean().item()
    assert record["figures"]["all"]["top1"]["by_seed"] == [pytest.approx(top1)]
    assert "written to" not in ranks[1].text()


def test_another_training_does_not_go_on_in_its_place(root, tmp_path):
    run_finetune(asked(root, tmp_path))
    with pytest.raises(ValueError, match=r"`train.micro_batch_size` is None .* and 8 in this run"):
        run_finetune(asked(root, tmp_path, micro_batch_size=8))


def test_what_another_checkpoint_of_that_name_began_is_not_believed(root, tmp_path):
    config = asked(root, tmp_path / "out", checkpoint=str(tmp_path / "run"))
    save_run(tmp_path / "run", config=RUN)
    run_finetune(config)
    save_run(tmp_path / "run", config=RUN, seed=99)  # in its place
    with pytest.raises(ValueError, match=r"`train.initial_encoder_sha256` is \w+ in .* and \w+ in this run"):
        run_finetune(config)
    settings = {"learning_rates": (0.01, 0.1), "weight_decays": (0.0,), "steps": 2, "mode": "finetune"}
    data = {name: getattr(config, name) for name in COMMON} | {"validation_fraction": 0.25}
    transfer = TransferConfig(**data | settings)
    run_transfer(transfer)
    save_run(tmp_path / "run", config=RUN, seed=98)
    with pytest.raises(ValueError, match=r"`train.initial_encoder_sha256` is \w+ in .*lr0.01-wd0"):
        run_transfer(transfer)


def names_of(root, classes):
    return [name for name in load_manifest(root / "train" / "set.beton").files if name.split("/")[0] in classes]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["0000.png", "nothing.png"]}, "1 of the 2 names in .*list.txt names no image .*: 'nothing.png'"),
        ({"labels": ["class0", "class2"]}, r"list.txt has none of class 1 \(class1\), 3 \(class3\); name some"),
        ({"labels": SubsetConfig(per_class=17)}, "must be between 1 and 16, the size of class 0, got 17"),
        (
            {"labels": SubsetConfig(per_class=1)},
            "`global_batch_size` must not exceed the 4 labelled images, got 16; use",
        ),
        ({"head_layers": 4}, "`head_layers` must be from 0 to 3"),
        ({"representation": "pixels"}, "`representation` must be learned or random .* got pixels"),
        ({"weights": "average"}, "`weights` must be live"),
        ({"test_data": "train/../nowhere.beton"}, "nowhere.beton"),
        ({"checkpoint": "imported", "head_layers": 1}, "`head_layers` must be 0 for .*, which holds an encoder alone"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_made(root, tmp_path, changes, message):
    labels = changes.get("labels")
    if isinstance(labels, list):
        names = names_of(root, labels) or labels
        (tmp_path / "list.txt").write_text("\n".join(names))
        changes = changes | {"labels": SubsetConfig(list=str(tmp_path / "list.txt"))}
    if changes.get("checkpoint") == "imported":
        encoder = {name: t for name, t in build_method(RUN.model, 0).state_dict().items() if "encoder." in name}
        path = checkpoint_path(tmp_path / "imported", 0)
        save_checkpoint(path, Checkpoint(model=encoder, config=resolved_dict(RUN), position={"step": 0}))
        changes = changes | {"checkpoint": str(path)}
    with pytest.raises((ValueError, OSError), match=message):
        run_finetune(asked(root, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [{"epochs": 0}, {"num_seeds": 0}, {"global_batch_size": 0}, {"recipe": "v3"}])
def test_numbers_and_names_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=f"`{next(iter(value))}` must be"):
        FinetuneConfig(checkpoint="c", train_data="a", test_data="b", **value)
