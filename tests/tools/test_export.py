"""`tools.export`: other programs load what it writes, and represent images as the encoder does."""

import json
import subprocess
import sys
import zipfile

import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from tests.tools.encoder_checkpoints import MEAN, STD, write_checkpoint
from tests.train.runs import finish, start
from tools import export as export_module
from tools.export import export
from train.cli import RunFailed, UnfitEnvironment

ROUNDING = 1e-5  # of the largest number: other kernels and folded batch norms; measured 6e-7 at most


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def assert_represents(model, encoder, batch):
    h = encoder(batch)
    assert h.abs().max() > 0.1
    assert (h - h[0]).abs().max() > 1e-3 or len(batch) == 1  # images are told apart
    torch.testing.assert_close(model(batch), h, rtol=0, atol=ROUNDING * float(h.abs().max()))


def load_as_the_description_says(path):
    """Run the lines in the JSON beside a file, as a user would from its folder."""
    names = {}
    lines = json.loads(path.with_name(f"{path.name}.json").read_text())["load"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        exec("\n".join(lines), names)
    return names["model"]


def check_both_libraries_take(folder, *, published=True, **config):
    source = folder / f"{config['depth']}-{config.get('stem')}.safetensors"
    encoder = write_checkpoint(source, **config)
    for keys in ("torchvision", "timm"):
        exported = export(source, "safetensors", keys=keys)
        assert exported.path == folder / source.stem / "export" / f"encoder-{keys}.safetensors"
        assert exported.deviation <= ROUNDING
        model = load_as_the_description_says(exported.path)
        assert type(model).__module__.split(".")[0] == keys
        assert all(type(layer) is not nn.SyncBatchNorm for layer in model.modules())
        assert model.bn1.num_batches_tracked == 7
        assert_represents(model, encoder, images(2, 3, 40, 40))
        assert exported.changes == () or not published
    if published:  # with the classifier that a user of their functions has, too: only it is left as it was
        weights = safetensors.torch.load_file(exported.path)
        for model in (
            torchvision.models.get_model(f"resnet{config['depth']}", num_classes=7),
            timm.create_model(f"resnet{config['depth']}", num_classes=7),
        ):
            missing = model.load_state_dict(weights, strict=False)
            assert (set(missing.missing_keys), missing.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
            model.fc = nn.Identity()
            assert_represents(model.eval(), encoder, images(2, 3, 40, 40))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvision_and_timm_load_the_weights_unchanged(tmp_path, depth):
    check_both_libraries_take(tmp_path, depth=depth)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [101, 152])
def test_torchvision_and_timm_load_the_weights_of_deep_ones_unchanged(tmp_path, depth):
    check_both_libraries_take(tmp_path, depth=depth)


def test_what_differs_from_the_published_networks_is_named_and_loads_when_changed_so(tmp_path):
    check_both_libraries_take(tmp_path, depth=18, stem="cifar", published=False)
    check_both_libraries_take(tmp_path, depth=10, published=False)
    check_both_libraries_take(tmp_path, depth=10, stem="cifar_padded", published=False)
    check_both_libraries_take(tmp_path, depth=10, stem="cifar_linear", published=False)
    stem, ten = (
        json.loads((tmp_path / name / "export" / "encoder-torchvision.safetensors.json").read_text())
        for name in ("18-cifar", "10-None")
    )
    assert stem["changes"] == [
        "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]
    assert ten["changes"] == [
        "model = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])"
    ]
    with safetensors.safe_open(tmp_path / "18-cifar/export/encoder-timm.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # what timm and Hugging Face's libraries ask for
    inside = json.loads(metadata["twinview"])
    assert inside["changes"] == stem["changes"]
    assert (inside["input"]["mean"], inside["input"]["std"]) == (list(MEAN), list(STD))
    assert (inside["input"]["side"], inside["input"]["interpolation"][:8], inside["step"]) == (40, "bilinear", 12)


@pytest.mark.parametrize(
    ("config", "batches", "refused"),
    [
        ({"depth": 18, "width": 0.25}, [(1, 3, 40, 40), (3, 3, 33, 70), (2, 3, 64, 64)], None),
        ({"depth": 10, "width": 0.125, "stem": "cifar"}, [(1, 3, 40, 40), (3, 3, 9, 30)], None),
        ({"depth": 50, "width": 0.125, "selective_kernel": True}, [(1, 3, 40, 40), (3, 3, 40, 40)], (1, 3, 48, 48)),
    ],
    ids=["wide", "cifar", "selective"],
)
def test_onnx_and_program_hold_the_network_for_any_number_of_images(tmp_path, config, batches, refused):
    encoder = write_checkpoint(tmp_path / "x.safetensors", **config)
    model_path = export(tmp_path / "x.safetensors", "onnx").path
    program_path = export(tmp_path / "x.safetensors", "torch_export").path

    model = onnx.load(model_path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    program = torch.export.load(program_path).module()
    for shape in batches:
        batch = images(*shape)
        assert_represents(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), encoder, batch)
        assert_represents(program, encoder, batch)
    sides = json.loads((tmp_path / "x/export/encoder.onnx.json").read_text())["sides"]
    if refused:
        assert sides == "40 alone"
        with pytest.raises(AssertionError):
            program(images(*refused))
        assert [d.dim_param or d.dim_value for d in session_shape(model)] == ["batch", 3, 40, 40]
    else:
        assert sides == f"any over {8 if 'stem' in config else 32}"
        assert [d.dim_param or d.dim_value for d in session_shape(model)] == ["batch", 3, "height", "width"]
    described = session.get_modelmeta().custom_metadata_map["twinview"]
    assert json.loads(described)["input"]["mean"] == list(MEAN)
    with zipfile.ZipFile(program_path) as archive:
        inside = b"".join(archive.read(name) for name in archive.namelist())
    assert b"/tools/" not in inside + model_path.read_bytes()  # no paths of the machine that wrote it


def session_shape(model):
    return model.graph.input[0].type.tensor_type.shape.dim


FRESH = """
import sys, torch
extra = {"twinview.json": ""}
program = torch.export.load("export/encoder.pt2", extra_files=extra)
images = torch.load("images.pt")
torch.save(program.module()(images), "h.pt")
print(extra["twinview.json"])
ours = {"native", "pipelines", "model", "train", "tools"} & {name.split(".")[0] for name in sys.modules}
sys.exit(f"imported {ours}" if ours else 0)
"""


def test_the_command_exports_a_run_and_a_fresh_process_without_our_code_runs_the_program(tmp_path):
    run_dir = tmp_path / "run"
    encoder = write_checkpoint(run_dir / "checkpoints" / "step-000000012.safetensors", depth=10, width=0.125)
    command = [sys.executable, "-m", "tools.export", f"--checkpoint={run_dir}", "--format=torch_export"]
    code, out, err = finish(start(command))
    assert (code, err) == (0, "")
    assert out.startswith(f"{run_dir}/export/encoder.pt2: deviates by ")
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["encoder.pt2", "encoder.pt2.json"]

    batch = images(3, 3, 50, 41)
    torch.save(batch, run_dir / "images.pt")
    fresh = subprocess.run([sys.executable, "-c", FRESH], cwd=run_dir, capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    assert json.loads(fresh.stdout)["input"]["std"] == list(STD)
    assert_represents(lambda _: torch.load(run_dir / "h.pt"), encoder, batch)


def test_the_average_is_another_file(tmp_path):
    live = write_checkpoint(tmp_path / "x.safetensors", depth=18, average=True)
    averaged = export(tmp_path / "x.safetensors", "safetensors", weights="average")
    assert averaged.path.name == "encoder-torchvision-average.safetensors"
    model = load_as_the_description_says(averaged.path)
    with torch.inference_mode():
        assert not torch.allclose(model(images(2, 3, 40, 40)), live(images(2, 3, 40, 40)), atol=0.1)
    write_checkpoint(tmp_path / "y.safetensors", depth=10)
    with pytest.raises(ValueError, match=r"holds no average of the weights; train with `train\.ema_decay`"):
        export(tmp_path / "y.safetensors", "safetensors", weights="average")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"depth": 10, "width": 0.125}, ("safetensors",), r"no ResNet that is wider in every layer, got .* 0\.125;"),
        ({"depth": 50, "width": 0.125, "selective_kernel": True}, ("safetensors",), "selective_kernel` does; export"),
        ({"depth": 10, "width": 0.125}, ("onnx", "timm"), "`--keys` needs `--format safetensors`, got onnx"),
    ],
)
def test_what_has_no_counterpart_is_refused_and_nothing_is_written(tmp_path, config, options, message):
    write_checkpoint(tmp_path / "x.safetensors", **config)
    file_format, keys = (*options, None)[:2]
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "x.safetensors", file_format, keys=keys)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_computes_something_else_never_gets_its_name(tmp_path, monkeypatch):
    """One scale in one layer is off while the file is written."""
    write_checkpoint(tmp_path / "x.safetensors", depth=10, width=0.125)
    plain = export_module.to_program

    def off(encoder, *rest):
        with torch.no_grad():
            encoder.layer3[0].bn1.weight[0] *= 1.5
            content = plain(encoder, *rest)
            encoder.layer3[0].bn1.weight[0] /= 1.5
        return content

    monkeypatch.setattr(export_module, "to_program", off)
    with pytest.raises(RunFailed, match=r"would deviate by .* of the largest number .* nothing was written"):
        export(tmp_path / "x.safetensors", "torch_export")
    assert list((tmp_path / "x" / "export").iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "x.safetensors", depth=10, width=0.125)
    monkeypatch.setattr("tools.export_formats.ONNX_PACKAGES", ("onnx", "onnxscribe"))
    with pytest.raises(UnfitEnvironment, match="of which onnxscribe cannot be found; pip install -r requirements-"):
        export(tmp_path / "x.safetensors", "onnx")
    write_checkpoint(tmp_path / "x.safetensors", depth=10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnfitEnvironment, match="`--keys timm` needs timm"):
        export(tmp_path / "x.safetensors", "safetensors", keys="timm")
