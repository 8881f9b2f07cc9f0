"""A profile survives its JSON to the last bit, and nothing else passes for one."""

import json
from dataclasses import replace

import pytest

from tools.profile_results import STAGES, Profile, Stage, rate

DECODE = Stage(
    name="decode",
    images_per_sec=1234.5678901234567,
    side="loading",
    seconds_per_batch=0.1,
    spread=1 / 3,
    how="libjpeg-turbo on 4 threads",
)
PROFILE = Profile(
    stages={"decode": DECODE, "forward": replace(DECODE, name="forward", side="training", place="device")},
    loading_images_per_sec=1000.1,
    training_images_per_sec=2000.2,
    together_images_per_sec=900.3,
    data_wait=0.25,
    world_size=2,
    local_world_size=2,
    local_batch_size=128,
    global_batch_size=256,
    num_samples=50_000,
    device="cpu",
    device_name="a processor",
    num_cores=2,
    loader="ffcv",
    num_threads=2,
    cpu_threads=2,
    precision="fp32",
    encoder={"depth": 50, "width": 1.0, "sk": False},
    image_side=224,
    num_views=2,
    bytes_per_image_stored=54_321.0,
    bytes_per_image_to_device=1_204_232.0,
    parameters=27_968_832,
    gradient_bytes=4 * 27_968_832,
    memory={"peak_bytes": 1e9, "activation_bytes_per_image": 1e8, "state_bytes": 3e8},
    flops_per_image=None,
    config={"data": {"path": "x.beton", "subset": {"list": None}}, "seed": 2**53},
    environment={"versions": {"torch": "2.15.0"}, "load": [0.1, 0.2, 0.3]},
    command="python -m tools.profile_throughput --config c.yaml",
)


def test_json_round_trip_is_exact() -> None:
    text = json.dumps(PROFILE.to_json(), allow_nan=False)
    again = Profile.from_json(json.loads(text))
    assert again == PROFILE
    assert isinstance(again.stages["forward"], Stage)
    assert list(again.stages) == ["decode", "forward"]
    assert json.dumps(again.to_json(), allow_nan=False) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "twinview-plan"}, "`format` must be twinview-profile, got twinview-plan"),
        ({"format_version": 2}, "`format_version` must be 1, got 2"),
        ({"colour": "red"}, "difference in colour"),
        ({"stages": [1]}, "`stages` must hold a stage"),
        ({"stages": {"decode": {"name": "decode"}}}, "difference in how, images_per_sec"),
        ({"stages": {"decode": DECODE.__dict__ | {"name": "dekode"}}}, "got 'dekode'"),
    ],
)
def test_what_is_no_profile_is_refused_in_a_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Profile.from_json(PROFILE.to_json() | change)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_missing_is_named() -> None:
    values = PROFILE.to_json()
    del values["data_wait"]
    with pytest.raises(ValueError, match="difference in data_wait"):
        Profile.from_json(values)
    with pytest.raises(ValueError, match="got list"):
        Profile.from_json([values])


def test_rate_is_of_all_ranks() -> None:
    assert rate(0.5, 256) == 512.0  # 2 ranks, 128 images each in half a second
    assert len(set(STAGES)) == 11
