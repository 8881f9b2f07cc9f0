"""SimCLR v2 in real runs of the training loop, on a few images: pretraining with a memory, and distillation."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.memory import MemoryConfig
from model.methods.distill import Distill, DistillConfig
from model.methods.supervised import ClassifierConfig
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import open_beton
from pipelines.build import DataConfig, build_loader, open_data
from pipelines.subset import SubsetConfig, choose_rows
from tests.pipelines.betons import make_beton
from tests.reliability.forked import Forked
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import PretrainConfig, TrainConfig, config_from_dict, read_run_config
from train.evaluation.distill import DistillationConfig, StudentConfig, run_distillation
from train.evaluation.network_accuracy import load_network
from train.evaluation.protocol import PROTOCOLS, evaluate
from train.gradient_cache import cached_projections
from train.initial_encoder import load_initial_encoder
from train.interruption import Interruption
from train.online.collapse import measure_spread
from train.online.config import OnlineConfig
from train.optim.lars import LARSConfig
from train.run import train
from train.schedule import ScheduleConfig

AUGMENT = AugmentConfig(recipe="supervised", size=16, crop_area=(0.5, 1.0), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
SMALL = "distill-r10-0.0625x-seed0"
TRAIN = TrainConfig(device="cpu", precision="fp32", cpu_threads=1, log_every=1)
CUT = dataclasses.replace(TRAIN, keep_checkpoints=9, checkpoint_every=2, background_checkpoints=False)
ENCODER = EncoderConfig(depth=10, width=0.125, stem="cifar")


def run_of(folder, path, *, name="teacher", epochs=2, **changes):
    """A run of a tiny network; `changes` are whole sections."""
    sections = {
        "data": DataConfig(path=str(path), global_batch_size=12, num_threads=1),
        "augment": AUGMENT,
        "model": ModelConfig(
            method="supervised",
            encoder=ENCODER,
            projection_head=ProjectionHeadConfig(out_dim=8),
            classifier=ClassifierConfig(num_classes=3, head_layers=1),
        ),
        "optim": LARSConfig(name="sgd", base_lr=1.0, weight_decay=0.0),
        "schedule": ScheduleConfig(warmup_epochs=0.0),
        "train": dataclasses.replace(TRAIN, epochs=epochs),
        "online": OnlineConfig(linear_probe=False, watch_collapse=False),
    }
    return PretrainConfig(name=name, runs_dir=str(folder), **sections | changes)


def trained(config):
    with Interruption() as interruption:
        train(config, interruption)
    return config.run_dir


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("images"), [(24, 24)] * 36, encode="raw", num_classes=3).path


@pytest.fixture(scope="module")
def runs(beton, tmp_path_factory):
    """A folder with all that is trained here, in a process of its own, since a run takes its process's logging over."""
    folder = tmp_path_factory.mktemp("runs")
    forked = Forked(folder / "output", {}, train_everything, folder, beton)
    assert forked.end() == 0, forked.text()[-4000:]
    return folder


def train_everything(folder, beton):
    """The teacher `teacher`; `simclr` with a memory; students of the command; and runs that are cut off and resumed."""
    trained(run_of(folder, beton))
    for whole, cut in (
        (with_memory(folder, beton, "simclr"), with_memory(folder, beton, "simclr-cut")),
        (labelled_student(folder, beton, "student"), labelled_student(folder, beton, "student-cut")),
    ):
        trained(whole)
        paths = sorted((trained(cut) / "checkpoints").iterdir())
        for path in paths[2:]:
            path.unlink()
        trained(cut)
    config = asked(folder, beton, student=StudentConfig(width=0.0625), epochs=5, base_lr=1.0)
    result, path = evaluate(PROTOCOLS["distill"], config)
    assert path == folder / "out" / "distill-learned-r10-0.0625x.json"
    newest = latest_checkpoint(folder / "out" / SMALL).stat().st_mtime_ns
    assert run_distillation(config).figures == result.figures  # once more: nothing is trained
    assert latest_checkpoint(folder / "out" / SMALL).stat().st_mtime_ns == newest
    run_distillation(asked(folder, beton, epochs=1, checkpoint=str(folder / "simclr")))
    teach_in_turn(folder, beton)


def teach_in_turn(folder, beton):
    """A student teaches; then its teacher is another one in its place."""
    few = SubsetConfig(per_class=4)
    trained(
        run_of(folder, beton, name="few", epochs=1, data=DataConfig(path=str(beton), global_batch_size=12, subset=few))
    )
    first = asked(folder, beton, teacher=str(folder / "few"), output_dir=str(folder / "first"), epochs=1)
    (student,) = run_distillation(first).details["runs"]
    amounts = {}
    for name, labels in (
        ("none", None),
        ("same", few),
        ("other", dataclasses.replace(few, seed=1)),
        ("all", SubsetConfig()),
    ):
        told = {} if labels is None else {"labels": labels, "label_weight": 0.5}
        config = asked(folder, beton, teacher=student, output_dir=str(folder / name), epochs=1, **told)
        amounts[name] = list(run_distillation(config).figures)
    (folder / "amounts.json").write_text(json.dumps(amounts))
    newest = latest_checkpoint(folder / "few")
    newest.write_bytes(latest_checkpoint(folder / "teacher").read_bytes())
    with pytest.raises(ValueError, match=r"`train.teacher_sha256` is \w+ in .* and \w+ in this run"):
        run_distillation(first)
    with pytest.raises(ValueError, match=r"temperature` must be finite and above 0, got 0.0"):
        run_distillation(dataclasses.replace(first, temperature=0.0))


def with_memory(folder, beton, name):
    """Pretrains in micro-batches, with a memory that is gone around once an epoch."""
    pretraining = run_of(
        folder,
        beton,
        name=name,
        epochs=3,
        augment=dataclasses.replace(AUGMENT, recipe="simclr"),
        model=ModelConfig(encoder=ENCODER, memory=MemoryConfig(size=50, ema_decay=0.9)),
        online=OnlineConfig(linear_probe=False),
    )
    kept = dataclasses.replace(CUT, micro_batch_size=6, zero_stage=1, epochs=3)
    return dataclasses.replace(pretraining, train=kept)


def asked(folder, beton, **changes):
    common = {"global_batch_size": 12, "epochs": 4, "batch_size": 10, "device": "cpu"}
    common |= {"teacher": str(folder / "teacher"), "output_dir": str(folder / "out")}
    return DistillationConfig(train_data=str(beton), test_data=str(beton), **common | changes)


def labelled_student(folder, beton, name):
    """Learns from four labels a class beside the teacher."""
    labelled = SubsetConfig(per_class=4, seed=1)
    return run_of(
        folder,
        beton,
        name=name,
        data=DataConfig(path=str(beton), global_batch_size=12, num_threads=1, labelled=labelled),
        model=ModelConfig(
            method="distill",
            encoder=ENCODER,
            classifier=ClassifierConfig(num_classes=3),
            distill=DistillConfig(temperature=0.5, label_weight=0.5),
        ),
        train=dataclasses.replace(CUT, epochs=3, teacher=str(folder / "teacher")),
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_big_to_small_from_command_to_file(runs):
    record = json.loads((runs / "out" / "distill-learned-r10-0.0625x.json").read_text())
    assert record["details"]["distill"] == {"temperature": 1.0, "label_weight": 0.0}
    assert record["details"]["teacher"] == str(latest_checkpoint(runs / "teacher"))
    assert record["details"]["starts_from"] == "random weights"
    assert record["figures"]["all"]["num_test_samples"] == 36
    told = lines(runs / "out" / SMALL)
    assert len(told) == 5 * 3
    assert "accuracy" not in told[-1]
    network, _ = load_network(runs / "out" / SMALL)
    assert isinstance(network, Distill)
    assert (network.encoder.feature_dim, network.projection_head) == (32, None)
    saved = load_checkpoint(latest_checkpoint(runs / "out" / SMALL))
    assert saved.model.keys() == network.state_dict().keys()  # no teacher
    assert saved.optimizer.keys() == dict(network.named_parameters()).keys()


def test_self_distillation_from_a_pretrained_encoder(runs, beton):
    run_dir = runs / "out" / "distill-self-pretrained-seed0"
    config = config_from_dict(read_run_config(run_dir))
    assert config.model.distill.temperature == 0.1
    assert config.train.initial_encoder == str(latest_checkpoint(runs / "simclr"))
    started, drawn = build_method(config.model, config.seed), build_method(config.model, config.seed)
    load_initial_encoder(config.train.initial_encoder, started)
    teacher, _ = load_network(runs / "teacher")
    (view,) = next(loader_of(config.data, beton).epoch(0)).views
    losses = []
    for student in (started, drawn):
        student.set_teacher(teacher)
        losses.append(student([view])[0].item())
    assert lines(run_dir)[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert lines(run_dir)[0]["loss"] != pytest.approx(losses[1], rel=1e-5)


def first_line(config):
    """What the first step of a run must say: of the student as it is drawn, the teacher, and the labels that count."""
    method = build_method(config.model, config.seed)
    network, _ = load_network(Path(config.train.teacher))
    batch = next(loader_of(config.data, config.data.path).epoch(0))
    whole = open_beton(config.data.path)
    labels = torch.from_numpy(whole.labels.copy())[batch.sample_indices]
    rows = choose_rows(config.data.labelled, whole.labels, None, whole.num_samples)
    seen = torch.isin(batch.sample_indices, torch.from_numpy(rows))
    assert 0 < seen.sum() < 12
    with torch.no_grad():
        ours, theirs = method.logits(batch.views[0]), network.logits(batch.views[0])
        label_loss = F.cross_entropy(ours[seen], labels[seen])
        distillation = -0.25 * (theirs.div(0.5).softmax(1) * ours.div(0.5).log_softmax(1)).sum(1).mean()
    expected = {"label_loss": label_loss, "distillation_loss": distillation, "loss": (label_loss + distillation) / 2}
    expected["accuracy"] = (ours.argmax(1) == labels)[seen].float().mean()
    return {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}


@pytest.mark.parametrize("name", ["simclr", "student"])
def test_resume_is_bit_for_bit(name, runs):
    """With a memory and its network; with labels of some images, and the teacher loaded anew."""
    expected, found = (load_checkpoint(latest_checkpoint(runs / run)) for run in (name, f"{name}-cut"))
    assert expected.position["step"] == 9
    assert found.model.keys() == expected.model.keys()
    assert all(torch.equal(found.model[key], value) for key, value in expected.model.items())
    assert [line["loss"] for line in lines(runs / f"{name}-cut")] == [line["loss"] for line in lines(runs / name)]


def test_labels_count_beside_the_teacher(runs, beton):
    student = labelled_student(runs, beton, "student")
    told = lines(runs / "student")[0]
    assert told | first_line(student) == told
    all_labels = dataclasses.replace(student, data=dataclasses.replace(student.data, labelled=SubsetConfig()))
    with pytest.raises(ValueError, match=r"`data.labelled.per_class` is 4 in .* and None in this run"):
        trained(all_labels)


def test_pretraining_fills_the_memory(runs, beton):
    saved = load_checkpoint(latest_checkpoint(runs / "simclr"))
    assert saved.model["memory.num_pushed"] == 9 * 2 * 12
    norms = saved.model["memory.queue"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(50))
    assert not [name for name in saved.optimizer if name.startswith("memory.")]
    assert not torch.equal(saved.model["memory.encoder.conv1.weight"], saved.model["encoder.conv1.weight"])
    config = with_memory(runs, beton, "simclr")
    method = build_method(config.model, config.seed)
    views = next(loader_of(config.data, beton, config.augment).epoch(0)).views
    z = torch.cat(cached_projections(method, views, 6)[:2])  # the keys are not what is watched
    told = lines(runs / "simclr")[0]["projection_rank"]
    assert told == pytest.approx(measure_spread(z, z).projection_rank, rel=1e-4)


def loader_of(config, beton, augment=AUGMENT):
    return build_loader(
        config,
        open_data(config),
        build_recipe(augment),
        seed=0,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_cores=1,
    )


def test_amounts_are_those_that_a_student_goes_back_to(runs):
    amounts = json.loads((runs / "amounts.json").read_text())
    assert amounts == {"none": ["4"], "same": ["4"], "other": ["4+4"], "all": ["all"]}


def test_bad_input_is_named(runs, beton, tmp_path):
    other = make_beton(tmp_path / "two", [(24, 24)] * 8, encode="raw", num_classes=2).path
    pretrained = str(runs / "simclr")
    for changes, told in (
        ({"teacher": pretrained}, r"`train.teacher` must be a run of supervised or distill, .* is of simclr"),
        ({"teacher": str(tmp_path / "none")}, r"there is no checkpoint"),
        ({"test_data": str(other)}, r"`test_data` must have the classes of `train_data`"),
        (
            {"train_data": str(other), "test_data": str(other)},
            r"`test_data` must have the teacher's 3 classes, .* has 2",
        ),
        ({"global_batch_size": 64}, r"`global_batch_size` must not exceed the 36"),
        ({"checkpoint": pretrained, "student": StudentConfig(width=0.25)}, r"set `model.encoder` as there"),
    ):
        with pytest.raises(ValueError, match=told):
            run_distillation(dataclasses.replace(asked(runs, beton, output_dir=str(tmp_path / "out")), **changes))
    with pytest.raises(ValueError, match=r"`labels` needs a `label_weight` above 0"):
        asked(runs, beton, labels=SubsetConfig(fraction=0.1))
    student = labelled_student(runs, beton, "never")
    few = SubsetConfig(per_class=13)
    for section, changes, told in (
        ("augment", {"mean": (0.0, 0.0, 0.0)}, r"`augment.mean` must be the teacher's \[0.5, 0.5, 0.5\]"),
        ("model", {"classifier": ClassifierConfig(num_classes=4)}, r"`model.classifier.num_classes` must be the 3 of"),
        ("data", {"labelled": few}, r"labels per class must be between 1 and 12"),
    ):
        changed = dataclasses.replace(getattr(student, section), **changes)
        with pytest.raises(ValueError, match=told):
            trained(dataclasses.replace(student, **{section: changed}))
    assert not (runs / "never").exists()
    assert not (tmp_path / "out").exists()
