"""A whole profile, by real ranks: its figures fit together, and its counts are those of the data and the network."""

import json
from statistics import median

import numpy as np
import pytest

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.pipelines.betons import make_beton, natural_image
from tests.tools.profiled import profiles_of, steps_of
from tools.profile_results import STAGES, Profile
from tools.profile_stages import ProfileSettings

SIZES = [(120 + i % 5, 100 + i % 7) for i in range(48)]
LOADING = ["storage_cold", "storage_warm", "decode", "crop", "photometric"]
TRAINING = ["forward", "loss", "backward", "optimizer"]
SIDE = 16  # of a view


def assert_sound(profile):
    """Of one piece; how fast things are is nobody's business here."""
    for stage in profile.stages.values():
        assert stage.images_per_sec == pytest.approx(profile.global_batch_size / stage.seconds_per_batch)
        assert 0.0 < stage.images_per_sec < 1e12
        assert stage.side == ("training" if stage.name in {*TRAINING, "communication"} else "loading")
        assert stage.how
        assert "\n" not in stage.how
    for side in ("loading", "training", "together"):
        assert 0.0 < getattr(profile, f"{side}_images_per_sec") < 1e12
    assert 0.0 <= profile.data_wait <= 1.0
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("set"), SIZES)


def test_two_ranks(tmp_path, beton):
    [(first, second)] = profiles_of(tmp_path, [f"--data.path={beton.path}"], world_size=2, seconds=0.05)
    profile, other = Profile.from_json(first), Profile.from_json(second)
    assert list(profile.stages) == [*LOADING, "forward", "loss", "backward", "communication", "optimizer"]
    assert_sound(profile)
    assert not (tmp_path / "runs").exists()
    assert {name: stage.images_per_sec for name, stage in profile.stages.items()} == {
        name: stage.images_per_sec for name, stage in other.stages.items()
    }

    config = ModelConfig(
        encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"), projection_head=ProjectionHeadConfig(out_dim=16)
    )
    parameters = sum(p.numel() for p in build_method(config, seed=0).parameters())
    assert (profile.parameters, profile.gradient_bytes) == (parameters, 4 * parameters)
    assert profile.memory["state_bytes"] == 12 * parameters  # parameters, gradients, momentum
    assert profile.memory["peak_bytes"] > profile.memory["state_bytes"]
    assert profile.bytes_per_image_stored == np.mean(beton.sizes)
    assert profile.bytes_per_image_to_device == 2 * 3 * SIDE**2 * 4 + 8  # two views of float32 and a label
    assert (profile.world_size, profile.local_batch_size, profile.global_batch_size) == (2, 8, 16)
    assert (profile.num_samples, profile.num_views, profile.image_side) == (48, 2, SIDE)
    assert profile.encoder == {"depth": 10, "width": 0.125, "sk": False}
    assert profile.config["name"] == "run"
    assert profile.config["runs_dir"] == str(tmp_path / "runs")
    assert profile.command == "a test"


def test_parts_of_a_step_add_up_to_it_and_grow_with_the_network(tmp_path, beton):
    data = f"--data.path={beton.path}"
    wide = "--model.encoder.width=0.5"
    found = steps_of(tmp_path, [data], [data, wide], [data, "--train.micro_batch_size=4"])
    medians = []
    for whole, parts in found:  # CPU seconds: what else the machine does is not in them
        assert len(whole) == len(parts) == 6
        assert 0.6 < median(sum(part.values()) for part in parts) / median(whole) < 1.6
        medians.append({name: median(part[name] for part in parts) for name in parts[0]})
        assert all(medians[-1][name] > 0 for name in TRAINING)
        assert medians[-1]["communication"] == 0.0
    narrow, wider, in_pieces = medians
    assert wider["forward"] > 2 * narrow["forward"]  # 16 times the operations
    assert wider["backward"] > 2 * narrow["backward"]
    assert wider["loss"] < 2 * narrow["loss"] + 0.01  # of as many projections
    assert in_pieces["forward"] > 1.2 * narrow["forward"]  # each image goes through twice
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_shared_state_and_micro_batches(tmp_path, beton, stage):
    options = [f"--data.path={beton.path}", f"--train.zero_stage={stage}", "--train.micro_batch_size=4"]
    [(values, _)] = profiles_of(tmp_path, options, world_size=2)
    profile = Profile.from_json(values)
    assert set(profile.stages) == set(STAGES) - {"host_to_device"}
    assert_sound(profile)
    # The master copy and the momentum are shared out, from stage 2 on the gradients too; partitions are padded.
    shared = {1: 4 + 4 + 8 / 2, 2: 4 + 4 / 2 + 8 / 2}[stage]
    assert profile.memory["state_bytes"] == pytest.approx(shared * profile.parameters, rel=0.01)


@pytest.mark.slow
def test_loaders_have_the_stages_that_exist_there(tmp_path, beton):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        natural_image(*size, i).save(folder / f"{i:02d}.jpg")
    raw = make_beton(tmp_path / "raw", SIZES, encode="raw")
    variants = {
        "folder": [f"--data.path={folder}", "--data.loader=folder"],
        "dali": [f"--data.path={beton.path}", "--data.loader=dali"],
        "resident": [f"--data.path={beton.path}", "--data.loader=resident"],
        "raw": [f"--data.path={raw.path}"],
        "device": [f"--data.path={raw.path}", "--data.geometry=device"],
    }
    found = profiles_of(tmp_path, *variants.values(), seconds=0.2)
    profiles = {name: Profile.from_json(values) for name, (values,) in zip(variants, found, strict=True)}
    stages = {
        "folder": LOADING,
        "dali": ["storage_cold", "storage_warm", "decode", "photometric"],
        "resident": ["crop", "photometric"],
        "raw": LOADING,
        "device": LOADING,
    }
    for name, profile in profiles.items():
        assert list(profile.stages) == [*stages[name], *TRAINING], name
        assert profile.loader == (name if name in {"folder", "dali", "resident"} else "ffcv")
        assert_sound(profile)
    assert profiles["raw"].bytes_per_image_stored == 3 * np.mean([w * h for w, h in SIZES])
    assert "one graph" in profiles["dali"].stages["decode"].how


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`seconds` must be above 0"):
        ProfileSettings(seconds=0.0)
