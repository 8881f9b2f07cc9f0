"""Runs made to be limited by one thing, with the real parts: the limiter comes out right, and the advice helps.

Each situation is lopsided by far more than a busy machine can turn over.
"""

import json
from dataclasses import replace

import pytest

from model.build import EncoderConfig, ModelConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig, open_data
from tests.pipelines.betons import make_beton
from tests.reliability.forked import Forked, variables_of
from tools.profile_advice import diagnose
from tools.profile_communication import communication_named
from tools.profile_rig import only_steps
from tools.profile_stages import ProfileSettings, measure_profile
from tools.profile_surroundings import survey
from tools.profile_verify import verify
from train.config import PretrainConfig, TrainConfig
from train.runtime import choose_device, free_port, read_ranks

SECONDS = 0.3


def configured(beton, *, size, batch, **encoder):
    return PretrainConfig(
        name="situation",
        data=DataConfig(path=str(beton.path), global_batch_size=batch, num_threads=1),
        augment=AugmentConfig(size=size),
        model=ModelConfig(encoder=EncoderConfig(stem="cifar", **encoder)),
        train=TrainConfig(device="cpu", precision="fp32", cpu_threads=1),
    )


@communication_named()  # as the command does
def judge(config, output, surroundings, wanted, disk):
    """In a process of its own: measure, judge with some of the surroundings changed, and try advice of this name."""
    ranks = read_ranks()
    profile = measure_profile(config, ProfileSettings(seconds=SECONDS))
    if disk is not None:
        cold = replace(profile.stages["storage_cold"], images_per_sec=disk)
        profile = replace(profile, stages=profile.stages | {"storage_cold": cold})
    around = replace(survey(open_data(config.data), choose_device("cpu", ranks)), **surroundings)
    diagnosis = diagnose(profile, around)
    found = diagnosis.to_json()
    if wanted is not None:
        chosen = [advice for advice in diagnosis.advice if wanted in advice.change]
        narrowed = replace(diagnosis, advice=chosen[:1])
        found["verified"] = verify(narrowed, around, only_steps(config), ranks, seconds=SECONDS).to_json()
    output.write_text(json.dumps(found))


def judged(folder, config, *, wanted=None, disk=None, **surroundings):
    arguments = (config, folder / "found.json", surroundings, wanted, disk)
    process = Forked(folder / "output", variables_of(0, 1, free_port()), judge, *arguments)
    assert process.end() == 0, process.text()
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEGs of three million pixels."""
    return make_beton(tmp_path_factory.mktemp("large"), [(2000, 1500)] * 12, max_side=0)


@pytest.mark.slow
def test_large_jpegs_and_a_tiny_network_wait_for_decoding_and_smaller_images_help(large, tmp_path):
    config = configured(large, size=32, batch=6, depth=10, width=0.125)
    found = judged(tmp_path, config, wanted="convert.max_side")
    assert found["limiter"] == "decode"
    assert found["side"] == "loading"
    assert found["loading_images_per_sec"] < found["training_images_per_sec"]
    verified = found["verified"]
    assert verified["change"] in ({"convert.max_side": 40}, {"convert.max_side": 500})
    assert verified["kept"]
    assert verified["ratio"] > 1.5  # a sixteenth of the pixels at most


@pytest.mark.slow
def test_raw_images_and_a_large_network_wait_for_the_network(tmp_path):
    beton = make_beton(tmp_path, [(32, 32)] * 32, encode="raw")
    found = judged(tmp_path, configured(beton, size=32, batch=8, depth=18, width=0.5))
    assert found["limiter"] in ("forward", "backward")
    assert found["side"] == "training"
    assert found["headroom"]["decode"] > 10.0
    assert not any(advice["kind"] == "convert" for advice in found["advice"])


@pytest.mark.slow
def test_a_set_that_memory_does_not_hold_waits_for_slow_storage(large, tmp_path):
    """Pretended are the disk, of an image a second, and that memory has no room for the set."""
    config = configured(large, size=32, batch=6, depth=10, width=0.125)
    found = judged(tmp_path, config, disk=1.0, free_memory=0, set_bytes=10**12)
    assert found["limiter"] == "storage_cold"
    assert found["sustained_images_per_sec"] < 1.0 < found["together_images_per_sec"]
    assert any("machine.free memory" in advice["change"] for advice in found["advice"])
    held = judged(tmp_path, config, disk=1.0)
    assert held["limiter"] == "decode"
    assert held["sustained_images_per_sec"] == pytest.approx(held["together_images_per_sec"])
