"""A pretraining that starts from another encoder: its weights and nothing else, strictly, or one line that says why."""

import logging

import pytest
import torch

from model.build import ModelConfig, build_method
from model.resnet import EncoderConfig
from train.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint
from train.initial_encoder import encoder_weights, find_checkpoint, load_initial_encoder, results_dir

ENCODER = {"depth": 10, "width": 0.125, "stem": "cifar", "selective_kernel": False}
CONFIG = {"model": {"encoder": ENCODER}, "augment": {"mean": [0.5, 0.4, 0.3], "std": [1.0, 1.0, 1.0]}}


def method(seed, **encoder):
    return build_method(ModelConfig(encoder=EncoderConfig(**ENCODER | encoder)), seed)


def imported(path, seed=1, change=lambda state: None):
    """An encoder alone, as `tools.import_checkpoint` writes it."""
    state = {name: tensor for name, tensor in method(seed).state_dict().items() if name.startswith("encoder.")}
    change(state)
    save_checkpoint(path, Checkpoint(model=state, config=CONFIG, position={"step": 0}))
    return path


def test_the_encoder_is_the_other_one_and_the_rest_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ours, theirs = method(0), method(1)
    head = {name: tensor.clone() for name, tensor in ours.projection_head.state_dict().items()}
    storage = ours.encoder.conv1.weight.data_ptr()
    load_initial_encoder(imported(tmp_path / "x.safetensors"), ours)
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(ours.encoder.state_dict()[name], tensor), name
    for name, tensor in head.items():
        assert torch.equal(ours.projection_head.state_dict()[name], tensor), name
    assert ours.encoder.conv1.weight.data_ptr() == storage  # an optimizer may hold it already
    assert ours.encoder.conv1.weight.requires_grad
    assert "normalised by mean [0.5, 0.4, 0.3] and std [1.0, 1.0, 1.0]" in caplog.text


def test_a_run_directory_stands_for_its_latest_checkpoint_and_its_live_weights(tmp_path):
    for step, seed in ((4, 1), (8, 2)):
        save_checkpoint(
            checkpoint_path(tmp_path, step),
            Checkpoint(model=method(seed).state_dict(), average=method(9).state_dict(), config=CONFIG),
        )
    ours = method(0)
    load_initial_encoder(tmp_path, ours)
    assert torch.equal(ours.encoder.conv1.weight, method(2).encoder.conv1.weight)


def rename(state):
    state["encoder.extra"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "encoder", "message"),
    [
        (
            lambda state: None,
            {"width": 0.25},
            r"`conv1\.weight` must have shape \[16, 3, 3, 3\], got \[8, 3, 3, 3\] in ",
        ),
        (
            lambda state: None,
            {"depth": 18},
            r"lacks `layer1\.1\.conv1\.weight` \[8, 8, 3, 3\]; set `model\.encoder` as ",
        ),
        (
            lambda state: None,
            {"stem": "imagenet"},
            r"there \(depth: 10, selective_kernel: False, stem: cifar, width: 0\.125\)",
        ),
        (rename, {}, r"holds `extra` \[3\], which has no place"),
        (lambda state: state.clear() or rename({}), {}, r"holds no encoder: no tensor is named `encoder\.…`"),
    ],
    ids=["width", "depth", "stem", "unexpected", "none"],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path, change, encoder, message):
    path = imported(tmp_path / "x.safetensors", change=change)
    ours = method(0, **encoder)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_initial_encoder(path, ours)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_latest_and_best(tmp_path):
    for step, accuracy in ((4, 0.3), (8, 0.5), (12, 0.4)):
        state = Checkpoint(
            model=method(1).state_dict(),
            position={"step": step, "scores": {"knn_accuracy": accuracy}},
            config={"train": {"keep_best": "knn_accuracy"}},
        )
        save_checkpoint(checkpoint_path(tmp_path, step), state)
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 12)
    assert find_checkpoint(tmp_path, "best") == checkpoint_path(tmp_path, 8)
    state.config["train"]["keep_best"] = "probe_accuracy"
    save_checkpoint(checkpoint_path(tmp_path, 12), state)
    with pytest.raises(ValueError, match=r"no checkpoint of .* has the score that `train\.keep_best` compares"):
        find_checkpoint(tmp_path, "best")
    with pytest.raises(ValueError, match="`--which best` needs a run directory to choose in, got"):
        find_checkpoint(checkpoint_path(tmp_path, 8), "best")
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*; train first"):
        find_checkpoint(tmp_path / "checkpoints", "best")


def test_the_average_is_asked_for_by_name(tmp_path):
    path = imported(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"holds no average of the weights; train with `train\.ema_decay`"):
        encoder_weights(load_checkpoint(path), "average", path)
    both = Checkpoint(model=method(1).state_dict(), average=method(2).state_dict())
    assert torch.equal(encoder_weights(both, "average", path)["conv1.weight"], method(2).encoder.conv1.weight)
    assert torch.equal(encoder_weights(both, "live", path)["conv1.weight"], method(1).encoder.conv1.weight)


def test_results_lie_in_the_run_or_beside_a_file_of_its_own(tmp_path):
    assert results_dir(checkpoint_path(tmp_path, 4)) == tmp_path
    assert results_dir(tmp_path / "resnet50.safetensors") == tmp_path / "resnet50"
