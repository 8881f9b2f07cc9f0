"""The judgement of profiles put together by hand: which stage limits, what is advised, and what the model expects."""

import json
import math
from dataclasses import replace

import pytest

from pipelines.build import DataConfig
from tests.tools.hand_profiles import GB, around, profile_of, series
from tools.profile_advice import diagnose
from tools.profile_case import Case, words_of
from tools.profile_model import costs_of, limiting_stage
from train.config import PretrainConfig, TrainConfig

PHOTOS = {
    "storage_cold": 4000.0,
    "storage_warm": 90_000.0,
    "decode": 1400.0,
    "crop": 5200.0,
    "photometric": 3100.0,
    "forward": 900.0,
    "loss": 60_000.0,
    "backward": 420.0,
    "optimizer": 5000.0,
}
TINY_NETWORK = {"forward": 90_000.0, "loss": 1e6, "backward": 50_000.0, "optimizer": 900_000.0}
ON_GPU = PHOTOS | {
    "decode": 5000.0,
    "crop": 8000.0,
    "photometric": 60_000.0,
    "host_to_device": 40_000.0,
    "forward": 18_000.0,
    "backward": 9000.0,
    "loss": 900_000.0,
    "optimizer": 100_000.0,
}


def gpu(rates=ON_GPU, **others):
    return profile_of(rates, cores=16, device="cuda", gpu=("photometric",), **others)


def configured(**sections):
    data = {"path": "data/train.beton", "global_batch_size": 64} | sections.get("data", {})
    return PretrainConfig(name="hand", data=DataConfig(**data), train=TrainConfig(**sections.get("train", {})))


def advice_on(name, profile, surroundings):
    """The advice that changes this option, and nothing else."""
    found = [advice for advice in diagnose(profile, surroundings).advice if set(advice.change) == {name}]
    assert len(found) <= 1
    return found[0] if found else None


# What limits


@pytest.mark.parametrize(
    ("rates", "threads", "limiter"),
    [
        (PHOTOS, {}, "backward"),
        (PHOTOS | TINY_NETWORK, {}, "decode"),
        (PHOTOS | TINY_NETWORK | {"photometric": 900.0}, {}, "photometric"),
        (PHOTOS | TINY_NETWORK | {"crop": 300.0}, {}, "crop"),
        (PHOTOS | {"forward": 100.0}, {}, "forward"),
        (PHOTOS | TINY_NETWORK | {"optimizer": 300.0}, {}, "optimizer"),
        (PHOTOS | {"loss": 90.0}, {}, "loss"),
        (PHOTOS | {"communication": 70.0}, {}, "communication"),
        # One thread makes 400 images/s and could not feed what four make of 1000, although it takes less of the cores.
        (
            PHOTOS | {"decode": 600.0, "forward": 3000.0, "backward": 1500.0},
            {"num_threads": 1, "cpu_threads": 4},
            "decode",
        ),
    ],
)
def test_the_limiter_is_the_slowest_stage_of_the_side_that_sets_the_pace(rates, threads, limiter):
    assert diagnose(profile_of(rates, **threads), around()).limiter == limiter


def test_where_both_sides_share_the_cores_the_one_that_takes_more_of_their_time_limits():
    rates = PHOTOS | {"decode": 800.0, "forward": 1500.0, "backward": 700.0}  # 572 images/s loaded, 431 trained
    shared = costs_of(profile_of(rates), around())
    loading, training = series([90_000, 800, 5200, 3100]), series([1500, 60_000, 700, 5000])
    assert shared.images_per_sec == pytest.approx(1 / (1 / loading + 1 / training))
    assert limiting_stage(shared) == "backward"
    # Three threads that load as fast as four did take less of the cores than one that computes all the time does not.
    apart = costs_of(profile_of(rates, num_threads=3, cpu_threads=1), around())
    assert apart.images_per_sec == pytest.approx(min(loading, training))


def test_a_step_on_a_gpu_includes_what_the_loader_does_there():
    costs = costs_of(gpu(), around())
    training = series([18_000, 9000, 900_000, 100_000])
    assert costs.training == pytest.approx(1 / training + 1 / 60_000)
    assert costs.loading == pytest.approx(1 / series([90_000, 5000, 8000]))
    assert costs.images_per_sec == pytest.approx(min(1 / costs.training, 1 / costs.loading))
    assert limiting_stage(costs) == "decode"


def test_copies_limit_where_they_are_the_slowest():
    assert diagnose(gpu(ON_GPU | {"host_to_device": 1000.0}), around()).limiter == "host_to_device"
    assert diagnose(gpu(ON_GPU | {"photometric": 3000.0, "decode": 50_000.0}), around()).limiter == "photometric"


def test_cold_storage_limits_only_where_memory_does_not_hold_the_set():
    rates = PHOTOS | TINY_NETWORK | {"storage_cold": 100.0}
    profile = profile_of(rates)
    held = diagnose(profile, around(set_bytes=8 * GB, free_memory=8 * GB))
    assert held.limiter == "decode"
    assert any("first epoch" in note for note in held.notes)
    missed = diagnose(profile, around(set_bytes=8 * GB, free_memory=2 * GB))
    assert missed.limiter == "storage_cold"
    # A quarter of the images is read from memory, the others wait for storage.
    seconds = 1 / profile.loading_images_per_sec + 0.75 * (1 / 100 - 1 / 90_000)
    assert missed.sustained_images_per_sec == pytest.approx(
        profile.together_images_per_sec / profile.loading_images_per_sec / seconds, rel=0.05
    )
    memory, disk = (
        next(a for a in missed.advice if name in a.change) for name in ("machine.free memory", "machine.storage")
    )
    assert memory.expected_images_per_sec == pytest.approx(profile.together_images_per_sec)
    assert missed.sustained_images_per_sec < disk.expected_images_per_sec <= memory.expected_images_per_sec


def test_headroom_is_what_a_stage_could_do_against_what_the_run_does():
    profile = profile_of(PHOTOS)
    headroom = diagnose(profile, around()).headroom
    assert headroom["decode"] == pytest.approx(1400 / profile.together_images_per_sec)
    assert set(headroom) == set(profile.stages)


# What is advised


def test_one_decoding_thread_of_many_cores_gets_more():
    profile = profile_of(PHOTOS | TINY_NETWORK, num_threads=1, cpu_threads=4)
    advice = advice_on("data.num_threads", profile, around())
    assert advice.change == {"data.num_threads": 4}
    expected = costs_of(profile, around()).with_threads(num_threads=4).images_per_sec
    assert advice.expected_images_per_sec == pytest.approx(expected)
    assert 3.5 * profile.together_images_per_sec < expected < 4 * profile.together_images_per_sec
    assert words_of(advice.change) == "--data.num_threads 4"
    assert words_of({"convert.max_side": 64}) == "tools.convert --max-side 64"


def test_more_threads_do_not_make_ranks_talk_faster():
    rates = TINY_NETWORK | {"forward": 900.0, "backward": 450.0, "communication": 300.0}
    profile = profile_of(PHOTOS | rates, num_threads=2, cpu_threads=1, world_size=2, local_world_size=2)
    costs = costs_of(profile, around()).with_threads(cpu_threads=2)
    assert costs.device["backward"] == pytest.approx(1 / 900)
    assert costs.device["communication"] == pytest.approx(1 / 300)
    assert costs.training == pytest.approx(1 / series([1800, 900, 300, 2e6, 1.8e6]))
    found = [one for one in diagnose(profile, around()).advice if "train.cpu_threads" in one.change]
    assert [one.expected_images_per_sec < 300 for one in found] == [True]


def test_micro_batches_talk_as_often_for_each_image_of_a_larger_batch():
    rates = PHOTOS | TINY_NETWORK | {"communication": 300.0}
    alike = {"world_size": 2, "local_world_size": 2, "local_batch_size": 32}
    assert advice_on("data.global_batch_size", profile_of(rates, **alike), around()) is not None
    pieces = profile_of(rates, config=configured(train={"micro_batch_size": 8}), **alike)
    assert advice_on("data.global_batch_size", pieces, around()) is None


def test_threads_that_fight_over_cores_get_their_own():
    rates = PHOTOS | {
        "decode": 800.0,
        "crop": 1e5,
        "photometric": 1e5,
        "forward": 2000.0,
        "backward": 1000.0,
        "loss": 1e6,
    }
    fighting = diagnose(profile_of(rates, held=0.5), around()).advice[0]
    assert fighting.change == {"data.num_threads": 2, "train.cpu_threads": 2}
    loading, training = series([90_000, 800, 1e5, 1e5]), series([2000, 1000, 1e6, 5000])
    assert fighting.expected_images_per_sec == pytest.approx(min(loading / 2, training / 2))
    in_peace = diagnose(profile_of(rates, held=1.0), around())
    assert not any("train.cpu_threads" in advice.change for advice in in_peace.advice)


def test_a_gpu_that_waits_for_decoding_is_offered_all_that_takes_it_off_the_host():
    profile = gpu(num_threads=8)
    changes = [advice.change for advice in diagnose(profile, around()).advice]
    assert {"data.num_threads": 16} in changes
    assert {"data.loader": "dali"} in changes
    assert {"data.loader": "resident"} in changes  # 10,000 images of 500 × 375 pixels: 5.6 of 16 GB
    assert {"data.geometry": "device"} in changes
    assert advice_on("data.loader", profile, around(device_free=10 * GB)).change == {"data.loader": "dali"}
    assert advice_on("data.loader", profile, around(device_free=10 * GB, has_dali=False)) is None


def test_crops_on_the_device_need_room_on_the_way_to_it():
    roomy = advice_on("data.geometry", gpu(), around())
    assert roomy.expected_images_per_sec == pytest.approx(
        min(series([90_000, 5000]), 1 / costs_of(gpu(), around()).training), rel=0.02
    )
    assert advice_on("data.geometry", gpu(ON_GPU | {"host_to_device": 3500.0}), around()) is None


def test_large_jpegs_are_to_be_stored_smaller():
    profile = profile_of(PHOTOS | TINY_NETWORK)
    advice = [one for one in diagnose(profile, around(longest_side=2000)).advice if one.kind == "convert"]
    assert [one.change for one in advice] == [{"convert.max_side": 256}, {"convert.max_side": 500}]
    assert advice[0].command == "python -m tools.convert IMAGES data/train-256.beton --max-side 256"
    assert advice[0].effect
    share = 0.07 + 0.93 * (256 / 2000) ** 2
    seconds = 1 / profile.together_images_per_sec - (1 - share) / 1400
    assert advice[0].expected_images_per_sec == pytest.approx(1 / seconds)


def test_images_hardly_larger_than_their_views_are_not_made_smaller():
    advice = diagnose(profile_of(PHOTOS | TINY_NETWORK), around(longest_side=256)).advice
    assert [one.change for one in advice if one.kind == "convert"] == [{"convert.quality": 75}]


def test_tiny_jpegs_are_to_be_raw():
    tiny = around(longest_side=32, mean_pixels=1024.0)
    advice = [one.change for one in diagnose(profile_of(PHOTOS | TINY_NETWORK), tiny).advice if one.kind == "convert"]
    assert {"convert.encode": "raw"} in advice
    raw = diagnose(profile_of(PHOTOS | TINY_NETWORK), around(stored="raw", longest_side=32)).advice
    assert not any(one.kind == "convert" for one in raw)


def test_a_folder_is_to_be_converted():
    profile = profile_of(PHOTOS | TINY_NETWORK, config=configured(data={"loader": "folder", "path": "photos/train"}))
    advice = diagnose(profile, around(stored="files", longest_side=0, mean_pixels=0.0)).advice
    assert advice[0].command == "python -m tools.convert photos/train data/train.beton"
    assert advice[0].change == {"data.loader": "ffcv", "data.path": "data/train.beton"}


@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_on_a_cpu_other_loaders_than_ours_are_slower(loader):
    profile = profile_of(PHOTOS | TINY_NETWORK | {"crop": 500.0}, config=configured(data={"loader": loader}))
    assert advice_on("data.loader", profile, around(stored="raw")).change == {"data.loader": "ffcv"}


def test_a_set_that_is_dear_to_decode_may_stay_decoded_in_memory():
    """Crops then take fifteen times as long, of the thread that trains."""
    rates = {"storage_warm": 1e5, "decode": 50.0, "crop": 5000.0, "photometric": 5000.0} | TINY_NETWORK
    small = {"longest_side": 96, "stored": "jpeg", "mean_pixels": 96.0 * 96}
    profile = profile_of(rates, num_threads=4, cpu_threads=4)
    advice = advice_on("data.loader", profile, around(**small))
    assert advice.change == {"data.loader": "resident"}
    training = 1 / profile.training_images_per_sec
    assert advice.expected_images_per_sec == pytest.approx(1 / (1e-5 + 15 / 5000 + 1 / 5000 + training))
    assert advice_on("data.loader", profile, around(free_memory=10**8, **small)) is None


def test_large_images_are_decoded_at_less_than_their_size():
    profile = profile_of(PHOTOS | TINY_NETWORK, config=configured(data={"scaled_decode": False}))
    assert advice_on("data.scaled_decode", profile, around(longest_side=1500)).change == {"data.scaled_decode": True}
    assert advice_on("data.scaled_decode", profile, around(longest_side=500)) is None


def test_an_uneven_loader_makes_more_batches_ahead():
    rates = PHOTOS | {"decode": 50_000.0, "crop": 50_000.0, "photometric": 50_000.0}
    profile = profile_of(rates, num_threads=2, cpu_threads=2, held=0.8, data_wait=0.2)
    advice = advice_on("data.batches_ahead", profile, around())
    assert advice.change == {"data.batches_ahead": 4}
    assert advice.expected_images_per_sec == pytest.approx(profile.together_images_per_sec / 0.8)


@pytest.mark.parametrize(
    ("profile", "fast", "change"),
    [
        (profile_of(PHOTOS, config=configured(train={"precision": "fp32"})), True, {"train.precision": "bf16"}),
        (profile_of(PHOTOS, config=configured(train={"precision": "fp32"})), False, None),
        (profile_of(PHOTOS), False, {"train.precision": "fp32"}),
        (profile_of(PHOTOS), True, None),
    ],
)
def test_precision_follows_the_instructions_that_there_are(profile, fast, change):
    advice = advice_on("train.precision", profile, around(fast_bf16=fast))
    assert (advice.change if advice else None) == change


SLOW_NETWORK = ON_GPU | {"forward": 1800.0, "backward": 900.0, "optimizer": 6000.0}


def test_a_gpu_that_computes_is_offered_what_makes_the_step_cheaper():
    checkpointing = configured(train={"activation_checkpointing": True, "precision": "fp32"})
    changes = [
        one.change for one in diagnose(gpu(SLOW_NETWORK, config=checkpointing), around(device_memory=80 * GB)).advice
    ]
    assert {"train.precision": "bf16"} in changes
    assert {"train.compile": "default"} in changes
    assert {"train.activation_checkpointing": False} in changes
    assert {"data.global_batch_size": 128} in changes
    full = around(device_memory=10 * GB)
    assert advice_on("train.activation_checkpointing", gpu(SLOW_NETWORK, config=checkpointing), full) is None
    large = {"peak_bytes": 9.0 * GB, "activation_bytes_per_image": 1.3e8, "state_bytes": 3e8}
    assert advice_on("data.global_batch_size", gpu(SLOW_NETWORK, memory=large), full) is None


def test_a_larger_batch_spreads_what_happens_once_a_step():
    profile = gpu(SLOW_NETWORK)
    advice = advice_on("data.global_batch_size", profile, around())
    costs = costs_of(profile, around())
    seconds = costs.training - 0.5 / 6000 + 1 / 900_000
    assert advice.expected_images_per_sec == pytest.approx(1 / seconds)
    assert "learning rate" in advice.effect
    assert advice_on("data.global_batch_size", gpu(SLOW_NETWORK, num_samples=100), around()) is None


def test_micro_batches_that_need_not_be_are_advised_against():
    config = configured(train={"micro_batch_size": 16})
    assert advice_on("train.micro_batch_size", gpu(SLOW_NETWORK, config=config), around()).change == {
        "train.micro_batch_size": None
    }
    assert words_of({"train.micro_batch_size": None}) == "--train.micro_batch_size null"


def test_several_ranks_may_share_the_optimizer_out():
    profile = gpu(SLOW_NETWORK | {"communication": 30_000.0, "optimizer": 1500.0}, world_size=8, local_world_size=8)
    assert advice_on("train.zero_stage", profile, around()).change == {"train.zero_stage": 1}
    shared = gpu(
        SLOW_NETWORK | {"communication": 700.0, "optimizer": 1e6},
        world_size=8,
        local_world_size=8,
        config=configured(train={"zero_stage": 1}),
    )
    assert advice_on("train.zero_stage", shared, around()).change == {"train.zero_stage": 0}
    assert advice_on("train.zero_stage", gpu(SLOW_NETWORK), around()) is None


def test_what_changes_nothing_that_is_learned_comes_first_among_equals():
    profile = profile_of(PHOTOS | TINY_NETWORK, num_threads=1, cpu_threads=4)
    advice = diagnose(profile, around(longest_side=4000)).advice
    gains = [round(10 * one.expected_images_per_sec / profile.together_images_per_sec) for one in advice]
    assert gains == sorted(gains, reverse=True)
    assert all(one.expected_images_per_sec >= 1.03 * profile.together_images_per_sec for one in advice)


# What is told


def test_a_run_that_has_all_it_can_get_is_left_alone():
    rates = {name: rate for name, rate in PHOTOS.items() if name not in ("decode", "crop", "photometric")}
    diagnosis = diagnose(profile_of(rates | {"crop": 1e6}), around(stored="raw", longest_side=32))
    assert diagnosis.advice == []
    assert diagnosis.limiter == "backward"


def test_a_busy_machine_and_sides_that_hinder_one_another_are_noted():
    load = {"load": [9.0, 4.0, 2.0], "num_cores": 4}
    notes = diagnose(profile_of(PHOTOS, held=0.6, environment=load), around()).notes
    assert any("load 9.0 on 4 cores" in note for note in notes)
    assert any("60%" in note and "hinder" in note for note in notes)
    assert diagnose(profile_of(PHOTOS, environment={"load": [4.0], "num_cores": 4}), around()).notes == []


def test_the_json_is_as_agreed():
    found = diagnose(profile_of(PHOTOS | TINY_NETWORK, num_threads=1), around()).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["limiter"] == "decode"
    assert found["stages_images_per_sec"] == PHOTOS | TINY_NETWORK
    assert {"change", "why", "expected_images_per_sec"} <= found["advice"][0].keys()
    assert found["profile"]["format"] == "twinview-profile"
    for name in ("headroom", "loading_images_per_sec", "training_images_per_sec", "together_images_per_sec"):
        assert name in found


def test_what_was_measured_is_what_no_change_is_expected_to_give():
    for held in (0.7, 1.0, 1.1):
        case = Case(profile_of(PHOTOS, held=held), around())
        assert case.expected(case.costs) == pytest.approx(case.profile.together_images_per_sec)
        assert case.now == pytest.approx(case.profile.together_images_per_sec)


def test_a_resident_set_on_a_gpu_has_no_loading():
    rates = {name: ON_GPU[name] for name in ("crop", "photometric", "forward", "loss", "backward", "optimizer")}
    profile = profile_of(
        rates, device="cuda", gpu=("crop", "photometric"), config=configured(data={"loader": "resident"})
    )
    costs = costs_of(profile, around())
    assert costs.loading == 0.0
    assert limiting_stage(costs) in ("backward", "crop")
    assert math.isfinite(costs.images_per_sec)
    assert diagnose(replace(profile, data_wait=0.5), around()).reason
