"""`tools.import_checkpoint`: encoders of torchvision, timm, lightly, solo-learn and MoCo, each in the file it comes in.

solo-learn is not installed here: its checkpoints are laid out as its published code names them (solo/methods/base.py).
"""

import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import safetensors.torch
import timm
import torch
import torchvision
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from tests.pipelines.betons import make_beton
from tests.tools.encoder_checkpoints import look_trained
from tests.train.runs import finish, start
from tools import import_checkpoint as module
from tools.import_checkpoint import import_checkpoint
from train.checkpoint import load_checkpoint
from train.cli import RunFailed
from train.config import config_from_dict
from train.evaluation.representation import build_encoder


def torchvision_resnet(depth=18, num_classes=5):
    return look_trained(torchvision.models.get_model(f"resnet{depth}", num_classes=num_classes)).eval()


def prefixed(prefix, network):
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def with_cifar_stem(network, padding=1):
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    return network


def without_classifier(network):
    network.fc = nn.Identity()
    return network


@torch.inference_mode()
def assert_represents(checkpoint_path, network, side=48):
    """The imported encoder gives the representations of the source's own network."""
    encoder = build_encoder("learned", load_checkpoint(checkpoint_path))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    h = network(images).flatten(1)
    assert h.abs().max() > 0.1
    torch.testing.assert_close(encoder(images), h, rtol=0, atol=1e-5 * float(h.abs().max()))


def check(folder, file_content, network, *, source, prefix, compared="representations", side=48, **options):
    """Import a file, and compare with the network that it came from; returns what was found."""
    file, out = folder / "theirs.pth", folder / "ours.safetensors"
    torch.save(file_content, file)
    found = import_checkpoint(file, out, force=True, **options)
    assert (found.source, found.prefix, found.compared) == (source, prefix, compared)
    assert found.deviation <= 1e-6
    assert_represents(out, network, side)
    return found


# Files as their programs write them


def test_torchvision_and_timm_by_logits(tmp_path):
    for depth in (18, 50):
        network = torchvision_resnet(depth)
        states = network.state_dict()
        found = check(
            tmp_path,
            states,
            without_classifier(network),
            source="torchvision",
            prefix="",
            compared="logits",
            depth=depth,
        )
        assert (found.config.depth, found.config.width, found.config.stem) == (depth, 1, "imagenet")
    network = look_trained(timm.create_model("resnet34", num_classes=3)).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "timm.safetensors")
    found = import_checkpoint(tmp_path / "timm.safetensors", tmp_path / "timm-ours.safetensors", source="timm")
    assert (found.source, found.compared, found.config.depth) == ("timm", "logits", 34)
    network.reset_classifier(0)
    assert_represents(tmp_path / "timm-ours.safetensors", network)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [101, 152])
def test_deep_ones_of_torchvision(tmp_path, depth):
    network = torchvision_resnet(depth)
    states = network.state_dict()
    check(tmp_path, states, without_classifier(network), source="torchvision", prefix="", compared="logits")


class LightlyMoCo(pytorch_lightning.LightningModule):
    """As lightly's examples build theirs."""

    def __init__(self, backbone, twin):
        super().__init__()
        self.save_hyperparameters({"lr": 0.06})
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(512, 64, 16)
        self.backbone_momentum = twin


def lightning_checkpoint(path, network):
    """What `Trainer` saves of it."""
    trainer = pytorch_lightning.Trainer(accelerator="cpu", devices=1, plugins=[LightningEnvironment()], barebones=True)
    trainer.strategy.connect(network)
    trainer.save_checkpoint(path, weights_only=True)
    return torch.load(path, weights_only=True)


def test_lightly_in_lightning_checkpoints(tmp_path):
    backbone = nn.Sequential(*list(torchvision_resnet().children())[:-1]).eval()
    twin = nn.Sequential(*list(look_trained(torchvision_resnet(), seed=9).children())[:-1]).eval()
    saved = lightning_checkpoint(tmp_path / "lightly.ckpt", LightlyMoCo(backbone, twin))
    assert "pytorch-lightning_version" in saved
    prefix = "state_dict.backbone."
    found = check(tmp_path, saved, backbone, source="lightly", prefix=prefix)
    assert found.config.stem == "imagenet"

    whole = without_classifier(torchvision_resnet())  # as lightly's benchmarks on ImageNet
    saved = lightning_checkpoint(tmp_path / "lightly.ckpt", LightlyMoCo(whole, None))
    check(tmp_path, saved, whole, source="lightly", prefix=prefix)


class WithoutLinear(nn.Module):
    """lightly's network up to its average pooling."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x = self.network.bn1(self.network.conv1(x)).relu()
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.network.get_submodule(stage)(x)
        return x.mean((2, 3))


def test_lightlys_own_networks(tmp_path):
    own = look_trained(ResNetGenerator("resnet-18", num_classes=4)).eval()
    found = check(tmp_path, own.state_dict(), WithoutLinear(own), source="lightly", prefix="", compared="logits")
    assert (found.config.depth, found.config.stem) == (18, "cifar")
    assert load_checkpoint(tmp_path / "ours.safetensors").config["augment"]["size"] == 32


def test_lightlys_own_network_taken_apart_as_in_its_benchmark(tmp_path):
    """Its ReLU after the first batch norm is no layer, and so is left behind."""
    apart = nn.Sequential(*list(look_trained(ResNetGenerator("resnet-9", width=0.25)).children())[:-1]).eval()
    features = nn.Sequential(*apart, nn.AdaptiveAvgPool2d(1))
    saved = {"state_dict": prefixed("backbone.", features)}
    found = check(tmp_path, saved, features, source="lightly", prefix="state_dict.backbone.")
    assert (found.config.depth, found.config.width, found.config.stem) == (10, 0.25, "cifar_linear")


def solo_learn(name, network, twin=None):
    """A checkpoint of solo-learn: Lightning's, with its names."""
    states = prefixed(f"{name}.", network) | {"classifier.weight": torch.zeros(10, 512)}
    states |= prefixed("projector.", nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4)))
    states |= {} if twin is None else prefixed(f"momentum_{name}.", twin)
    return {"epoch": 3, "pytorch-lightning_version": "1.9.5", "state_dict": states, "callbacks": {}}


def test_solo_learn_and_its_momentum_twin(tmp_path):
    network, twin = without_classifier(torchvision_resnet()), without_classifier(torchvision_resnet())
    look_trained(twin, seed=8)
    saved = solo_learn("backbone", network, twin)
    check(tmp_path, saved, network, source="solo_learn", prefix="state_dict.backbone.")
    check(tmp_path, solo_learn("encoder", network), network, source="solo_learn", prefix="state_dict.encoder.")
    cifar = look_trained(with_cifar_stem(without_classifier(torchvision_resnet()), padding=2)).eval()
    found = check(
        tmp_path, solo_learn("backbone", cifar), cifar, source="solo_learn", prefix="state_dict.backbone.", side=33
    )
    assert found.config.stem == "cifar_padded"
    file = tmp_path / "theirs.pth"
    torch.save(saved, file)
    found = import_checkpoint(file, tmp_path / "twin.safetensors", prefix="momentum_backbone")
    assert found.prefix == "state_dict.momentum_backbone."
    assert_represents(tmp_path / "twin.safetensors", twin)


def test_moco_under_data_parallel(tmp_path):
    """main_moco.py of MoCo v2: two encoders with MLP heads for `fc`, and a queue, under DistributedDataParallel."""
    query, key = torchvision_resnet(), torchvision_resnet()
    for network in (query, key):
        network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    states = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", look_trained(key, seed=8))
    saved = {
        "arch": "resnet18",
        "state_dict": states | {"module.queue": torch.zeros(16, 8)},
        "optimizer": {"state": {}},
    }
    features = without_classifier(query)
    check(tmp_path, saved, features, source="torchvision", prefix="state_dict.module.encoder_q.")


def test_half_precision_and_files_without_batch_counters(tmp_path):
    network = without_classifier(torchvision_resnet()).half()
    states = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    check(tmp_path, states, network.float(), source="torchvision", prefix="")


def test_the_command_and_the_evaluation_of_what_it_wrote(tmp_path):
    for name, count in (("train", 12), ("test", 6)):
        (tmp_path / name).mkdir()
        make_beton(tmp_path / name, [(24, 20)] * count, encode="raw", num_classes=2)
    network = look_trained(ResNetGenerator("resnet-9", width=0.25))
    network.linear = nn.Identity()
    torch.save({"state_dict": prefixed("backbone.", network)}, tmp_path / "lightly.ckpt")
    out = tmp_path / "imported.safetensors"
    options = [f"--file={tmp_path}/lightly.ckpt", f"--out={out}", "--size=24", "--mean", "0.5", "0.4", "0.3"]
    command = [sys.executable, "-m", "tools.import_checkpoint", *options]
    code, text, err = finish(start(command))
    assert (code, err) == (0, "")
    assert text.startswith(f"{out}: ResNet-10, width 0.25, cifar stem, lightly's under `state_dict.backbone.`; repres")
    config = config_from_dict(load_checkpoint(out).config)
    assert (config.augment.size, config.augment.mean, config.augment.std) == (
        24,
        (0.5, 0.4, 0.3),
        (0.229, 0.224, 0.225),
    )
    assert load_checkpoint(out).position["imported"] == {
        "file": "lightly.ckpt",
        "sha256": hashlib.sha256((tmp_path / "lightly.ckpt").read_bytes()).hexdigest(),
        "source": "lightly",
        "prefix": "state_dict.backbone.",
    }

    data = [f"--train_data={tmp_path}/train/set.beton", f"--test_data={tmp_path}/test/set.beton"]
    code, text, err = finish(
        start([sys.executable, "train/evaluate.py", "knn", f"--checkpoint={out}", *data, "--device=cpu"])
    )
    assert code == 0, err
    record = json.loads((tmp_path / "imported" / "evaluation" / "knn-learned.json").read_text())
    assert record["checkpoint"] == str(out)
    assert 0 <= record["accuracy"]["all"]["mean"] <= 1


# What is refused


def spoiled(change):
    states = torchvision_resnet().state_dict()
    change(states)
    return states


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: spoiled(lambda s: s.pop("layer3.1.bn2.bias")),
            r"lacks `layer3\.1\.bn2\.bias` \[256\]; it is no ResNet-18",
        ),
        (lambda: spoiled(lambda s: s.update(extra=torch.zeros(2))), r"holds `extra` \[2\], which has no place"),
        (
            lambda: torchvision.models.resnext50_32x4d().state_dict(),
            r"`layer1\.0\.conv1\.weight` must have shape \[64, 64, 1, 1\], got \[128, 64, 1, 1\]",
        ),
        (
            lambda: spoiled(lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 5, 5)})),
            r"`conv1\.weight` must be 7×7 \(ImageNet stem\) or 3×3 \(CIFAR stem\), got \[64, 3, 5, 5\]",
        ),
        (
            lambda: torchvision.models.vgg11().state_dict(),
            r"holds no ResNet as torchvision names it; its tensors are `feat",
        ),
        (
            lambda: {"student": torchvision_resnet().state_dict(), "other": torchvision_resnet().state_dict()},
            r"holds encoders under `student\.`, `other\.`; choose one with `--prefix`",
        ),
        (
            lambda: prefixed("backbone.", with_cifar_stem(without_classifier(torchvision_resnet()))),
            r"`--source` must be given: .* CIFAR stem",
        ),
    ],
    ids=["missing", "unexpected", "misshapen", "stem", "vgg", "two encoders", "whose stem"],
)
def test_what_does_not_fit_is_refused_by_its_first_name(tmp_path, content, message):
    torch.save(content(), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


class Evil:
    """Runs a command when it is unpickled by anyone who trusts it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_code_in_a_file_is_named_and_not_run(tmp_path, archive):
    marker, file = tmp_path / "was-run", tmp_path / "evil.pth"
    content = {"state_dict": torchvision_resnet().state_dict(), "hyper_parameters": Evil(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    words = refusal(file, tmp_path / "x")
    assert re.match(
        r"\S+ holds pickled code, `(posix|os)\.mkdir`, and was not loaded; save its state_dict alone", words
    )
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    torch.load(file, weights_only=False)
    assert marker.exists()  # so it would have run


def refusal(file, out):
    with pytest.raises(ValueError) as caught:
        import_checkpoint(file, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_and_foreign_files_get_one_line(tmp_path):
    torch.save(without_classifier(torchvision_resnet()).state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    out, file = tmp_path / "x", tmp_path / "file"
    for content, message in (
        (whole[: len(whole) // 2], "is not a checkpoint of torch.save, or is damaged; nothing was loaded"),
        (b"PK\x03\x04nothing", "is not a checkpoint of torch.save, or is damaged; nothing was loaded"),
        (b"\x80\x02nothing", "is not a checkpoint of torch.save, or is damaged; nothing was loaded"),
        (b"GIF89a", "is neither a checkpoint of torch.save nor safetensors, or is damaged"),
        (b"", "is neither a checkpoint of torch.save nor safetensors, or is damaged"),
    ):
        file.write_bytes(content)
        assert refusal(file, out) == f"{file} {message}"
    assert refusal(tmp_path / "nowhere", out) == f"there is no file {tmp_path}/nowhere"
    file.write_bytes(whole)
    import_checkpoint(file, out)
    assert refusal(file, out).startswith(f"{out} exists; name another")
    assert "`--depth` must be that of" in refusal_of_depth(file, tmp_path / "y")


def test_tensors_that_are_no_numbers_in_memory_get_one_line(tmp_path):
    file, whole = tmp_path / "file.pth", torchvision_resnet().state_dict()
    name = "layer1.0.conv1.weight"
    for change in (
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to(torch.int32),
    ):
        torch.save(whole | {name: change(whole[name])}, file)
        assert refusal(file, tmp_path / "x").startswith(
            f"`{name}` must be a dense tensor of floating-point numbers, got "
        )


def test_containers_in_themselves_and_in_one_another_cost_nothing(tmp_path):
    file, whole = tmp_path / "file.pth", torchvision_resnet().state_dict()
    doubled = {}
    for _ in range(30):  # 2³⁰ ways to its end
        doubled = {"left": doubled, "right": doubled}
    around = dict(whole) | {"doubled": doubled}
    around["again"] = around
    torch.save(around, file)
    import_checkpoint(file, tmp_path / "ours.safetensors")
    deep = whole
    for _ in range(100):
        deep = {"in": deep}
    torch.save(deep, file)
    assert (
        refusal(file, tmp_path / "x")
        == f"{file} holds containers more than 32 deep in one another; save the state_dict alone"
    )


def test_bad_normalisation_is_refused():
    for options, words in (
        ({"size": 0}, "`--size` must be at least 1, got 0"),
        ({"mean": (math.nan, 0, 0)}, "`--mean`"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            module.Normalisation(**options)


def refusal_of_depth(file, out):
    with pytest.raises(ValueError, match="18, got 50") as caught:
        import_checkpoint(file, out, depth=50)
    return str(caught.value)


def test_an_encoder_that_represents_otherwise_is_never_written(tmp_path, monkeypatch):
    """Two tensors of one shape change places on the way."""
    torch.save(torchvision_resnet().state_dict(), tmp_path / "theirs.pth")
    plain = module._map

    def swapped(*arguments):
        weights = plain(*arguments)
        first, second = "layer2.0.bn1.weight", "layer2.0.bn2.weight"
        return weights | {first: weights[second], second: weights[first]}

    monkeypatch.setattr(module, "_map", swapped)
    with pytest.raises(RunFailed, match=r"^logits of .* deviate by \d.* nothing was written"):
        import_checkpoint(tmp_path / "theirs.pth", Path(tmp_path / "ours.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]
