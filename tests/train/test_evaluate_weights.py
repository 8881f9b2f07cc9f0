"""Which checkpoint of a run, and which of its weights, an evaluation takes: by the file it names and what it loads."""

import json

import pytest
import torch

from model.build import ModelConfig, build_method
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from tests.pipelines.betons import make_beton
from train.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint
from train.config import PretrainConfig, resolved_dict
from train.evaluation.features import build_encoder
from train.evaluation.run import EvaluateConfig, evaluate

CONFIG = PretrainConfig(
    name="run",
    data=DataConfig(path="set.beton"),
    augment=AugmentConfig(size=16),
    model=ModelConfig(encoder=EncoderConfig(depth=10, width=0.125, stem="cifar")),
)


def state(seed):
    return build_method(CONFIG.model, seed).state_dict()


@pytest.fixture
def run_dir(tmp_path):
    """Step 4 is the best, step 8 the latest, which alone has an average."""
    for step, average in ((4, {}), (8, state(88))):
        position = {"step": step, "scores": {"loss": float(step)}}
        checkpoint = Checkpoint(model=state(step), average=average, config=resolved_dict(CONFIG), position=position)
        save_checkpoint(checkpoint_path(tmp_path, step), checkpoint)
    return tmp_path


def test_an_evaluation_takes_the_checkpoint_and_the_weights_that_are_asked_for(run_dir):
    make_beton(run_dir, [(24, 20)] * 8, encode="raw", num_classes=2)
    data = str(run_dir / "set.beton")
    common = {"checkpoint": str(run_dir), "train_data": data, "test_data": data, "device": "cpu", "k": 1}
    for options, name, step in (
        ({"which": "best"}, "knn-learned", 4),
        ({}, "knn-learned", 8),
        ({"weights": "average"}, "knn-learned-average", 8),
    ):
        evaluate(["knn"], EvaluateConfig(**common, **options))
        record = json.loads((run_dir / "evaluation" / f"{name}.json").read_text())
        assert record["checkpoint"] == str(checkpoint_path(run_dir, step))
        assert record["accuracy"]["all"]["mean"] == 1.0  # each image is its own nearest neighbour
    with pytest.raises(ValueError, match=r"step-000000004\.safetensors holds no average"):
        evaluate(["knn"], EvaluateConfig(**common, which="best", weights="average"))
    with pytest.raises(ValueError, match="`weights` average needs `representation` learned, got random"):
        EvaluateConfig(**common, weights="average", representation="random")


def test_the_encoder_is_loaded_alone_and_strictly(run_dir):
    checkpoint = load_checkpoint(checkpoint_path(run_dir, 8))
    for weights, seed in (("live", 8), ("average", 88)):
        encoder = build_encoder("learned", checkpoint, weights=weights)
        assert torch.equal(encoder.conv1.weight, state(seed)["encoder.conv1.weight"])
    assert not encoder.training
    for name in [name for name in checkpoint.model if not name.startswith("encoder.")]:
        del checkpoint.model[name]
    build_encoder("learned", checkpoint)
    del checkpoint.model["encoder.layer2.0.bn1.running_var"]
    with pytest.raises(
        ValueError, match=r"lacks `layer2\.0\.bn1\.running_var` \[16\]; its configuration is of another"
    ):
        build_encoder("learned", checkpoint)
