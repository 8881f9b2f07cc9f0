"""Predictions against numbers worked out on paper, and what must hold of every plan."""

import math
from dataclasses import replace

import pytest

from tests.tools.plan_profiles import changed, gpu_profile, profile, run_config
from tools.plan_config import PlanConfig
from tools.plan_model import make_plan
from tools.plan_scaling import find_limit, lost_shares, make_row, what_fits


def plan_of(*profiles, **options):
    return make_plan(profiles, PlanConfig(profile=("p",) * len(profiles), **{"gpus": (1,)} | options))


@pytest.fixture(scope="module")
def gpu():
    return gpu_profile()


@pytest.mark.parametrize(
    "rates",
    [
        {"loading": 1600.0, "training": 1280.0, "together": 1250.0},  # side by side
        {"loading": 900.0, "training": 1280.0, "together": 850.0},  # the loader is slower
        {"loading": 1600.0, "training": 1280.0, "together": 711.1},  # taking turns: 1/1600 + 1/1280
        {"loading": 1600.0, "training": 1280.0, "together": 1400.0},  # noise: faster than its parts
        {"loading": 1600.0, "training": 1280.0, "together": 300.0},  # slower than both in turn
    ],
)
def test_the_profiles_own_hardware_gives_the_profiles_own_rate(rates):
    for each in (gpu_profile(**rates), profile(**rates)):
        assert plan_of(each).step(1).images_per_sec == pytest.approx(each.together_images_per_sec, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_profile_of_several_ranks_gives_its_own_rate_too(ranks):
    parts = {"decode": 0.03, "forward": 0.02, "loss": 0.002, "backward": 0.04}
    parts |= {"communication": 0.015, "optimizer": 0.003}
    several = profile(ranks=ranks, seconds=parts, local_world_size=ranks)
    plan = plan_of(several, gpus=(ranks,))
    assert plan.step(ranks).images_per_sec == pytest.approx(640.0, rel=1e-9)
    # the step of 80 ms is shared out as its parts: 15 of 80 ms are communication
    assert sum(plan.step(ranks).parts[name] for name in ("network", "latency")) == pytest.approx(
        0.015 * plan.costs.residual, rel=1e-9
    )


def test_a_further_profile_that_says_otherwise_is_told():
    wide = changed(profile(), together_images_per_sec=1280.0)
    assert plan_of(profile(), profile()).remarks == []
    (remark,) = plan_of(profile(), wide, global_batch_size=32).remarks
    assert remark.startswith("the profile of 1 × 64 images has 1,280 images/s, of which the model makes 640")


def test_a_step_on_eight_gpus_worked_out_on_paper(gpu):
    """256 images in 0.2 s on one; parts 60 + 135 + 1 + 4 ms. On 8 with 256 images each, weak."""
    plan = plan_of(gpu, local_batch_size=256, gpus_per_node=8)
    step = plan.step(8)
    gradients = 2 * 7 / 8 * 4 * plan.counts.parameters / 200e9 + 6 * 3e-6  # a tree of 8: 6 steps
    rows = 4 * 2 * 2048 * 128 * 7 / 8 / 200e9 + 4 * 2 * 2048 * 7 / 8 / 200e9 + 14 * 3e-6
    assert step.parts["compute"] == pytest.approx(0.195 * plan.costs.residual)
    assert step.parts["optimizer"] == pytest.approx(0.004 * plan.costs.residual)
    assert step.parts["network"] == pytest.approx((gradients + rows) * plan.costs.residual)
    small = 2 * plan.counts.norm_layers + 1
    assert step.parts["latency"] == pytest.approx(small * 18e-6 * plan.costs.residual, rel=0.2)  # and some bytes
    assert step.parts["latency"] > small * 18e-6 * plan.costs.residual
    # loading (0.16 s) and training overlap but for χ of it: 256/1250 = 0.2 + χ · 0.16
    assert plan.costs.interference == pytest.approx((256 / 1250 - 0.2) / 0.16)
    assert step.seconds == pytest.approx(
        sum(step.parts[name] for name in ("compute", "batch", "loss", "optimizer", "network", "latency"))
        + plan.costs.interference * 0.16
    )
    assert step.images_per_sec == pytest.approx(2048 / step.seconds)


def test_endless_bandwidth_and_no_latency_leave_the_compute_bound(gpu):
    still = {"latency_us": 0.0, "intra_node_latency_us": 0.0}
    plan = plan_of(
        gpu, local_batch_size=256, bandwidth_gbps=math.inf, intra_node_gbps=math.inf, **still, gpus_per_node=8
    )
    step = plan.step(64)
    assert step.parts["network"] == step.parts["latency"] == 0
    grown_loss = plan.step(64).parts["loss"] - plan.step(1).parts["loss"]
    assert step.seconds == pytest.approx(plan.step(1).seconds + grown_loss)


@pytest.mark.parametrize("options", [{"global_batch_size": 4096}, {"local_batch_size": 256}])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"size": 96, "depth": 18},
        {"bandwidth_gbps": 10.0, "gpus_per_node": 4},
        {"storage_mb_per_sec": 500.0, "storage": "shared"},
        {"cpu_cores_per_gpu": 6.0},
        {"zero_stage": 2, "overlap": 0.5},
    ],
)
def test_efficiency_falls_and_never_exceeds_one(gpu, options, more):
    plan = plan_of(gpu, **options, **more)
    values = [plan.efficiency(2**i) for i in range(10)]
    assert values[0] == 1.0
    assert all(0 < value <= 1 for value in values)
    assert values == sorted(values, reverse=True)


def test_more_bandwidth_is_never_slower_and_costs_grow_with_the_price(gpu):
    rates = [
        plan_of(gpu, global_batch_size=4096, bandwidth_gbps=gbps).step(64).images_per_sec
        for gbps in (1.0, 10.0, 100.0, 400.0, math.inf)
    ]
    assert rates == sorted(rates)
    assert len(set(rates)) == 5
    costs = [make_row(plan_of(gpu, price_per_gpu_hour=price), 1).cost for price in (0.0, 1.0, 2.5)]
    assert costs == [0.0, pytest.approx(costs[2] / 2.5), costs[2]]


def test_hours_and_cost_on_paper(gpu):
    """1,281,167 images make 5004 steps of 256; 100 epochs of them at 1250 images/s."""
    row = make_row(plan_of(gpu, price_per_gpu_hour=2.0), 1)
    assert row.hours == pytest.approx(100 * 5004 * 256 / 1250 / 3600)
    assert row.cost == pytest.approx(2.0 * row.hours)
    fewer = make_row(plan_of(gpu, images=25_600, epochs=7), 1)
    assert fewer.hours == pytest.approx(7 * 25_600 / 1250 / 3600)


def test_resolution_and_backbone_scale_by_operations(gpu):
    """A view of twice the side has four times the pixels, a ResNet of double width nearly four times the products."""
    base = plan_of(gpu)
    assert plan_of(gpu, size=448).compute_factor == pytest.approx(4, rel=0.02)
    assert plan_of(gpu, width=2.0).compute_factor == pytest.approx(4, rel=0.05)
    assert plan_of(gpu, depth=101).compute_factor == pytest.approx(7.8 / 4.1, rel=0.05)  # He et al., table 1
    assert base.compute_factor == 1
    assert plan_of(gpu, precision="fp32").compute_factor == 2.0
    assert plan_of(gpu, precision="fp32", precision_speedup=3.0).compute_factor == 3.0
    assert plan_of(gpu, depth=50, width=2.0, selective_kernel=True).counts.parameters > 130e6


def test_loading_follows_cores_pixels_and_storage(gpu):
    """0.16 s for 256 images on 16 cores, of which crop and copy, 0.06 of 0.16, follow the pixels."""
    each = 0.16 / 256
    assert plan_of(gpu).loading_s(1) == (pytest.approx(each), "loading")
    assert plan_of(gpu, cpu_cores_per_gpu=4.0).loading_s(1)[0] == pytest.approx(4 * each)
    assert plan_of(gpu, size=112).loading_s(1)[0] == pytest.approx(each * (0.10 + 0.06 / 4) / 0.16)
    # 50,000 bytes an image at 50 MB/s: 1000 images/s for a machine, shared by 8 GPUs, or by all 64
    slow = plan_of(gpu, storage_mb_per_sec=50.0)
    assert slow.loading_s(8) == (pytest.approx(8 / 1000), "storage") == slow.loading_s(64)
    shared = plan_of(gpu, storage_mb_per_sec=50.0, storage="shared", global_batch_size=4096)
    assert shared.loading_s(64)[0] == pytest.approx(64 / 1000)
    assert shared.step(64).images_per_sec == pytest.approx(1000, rel=0.05)
    assert shared.step(64).bound == "storage"


def test_memory_of_the_profiles_hardware_is_the_profiles_peak(gpu):
    assert plan_of(gpu).step(1).memory.peak == pytest.approx(28e9)
    plan = plan_of(gpu, gpu_memory_gb=80.0, global_batch_size=4096)
    assert [make_row(plan, gpus).fits for gpus in (1, 4, 8, 64)] == [False, False, True, True]
    # activations of 4096/8 images, of 95 MB each, and what 256 images left beside theirs
    beside = 28e9 - 256 * 95e6
    assert plan.step(8).memory.peak == pytest.approx(512 * 95e6 + beside, rel=0.01)
    pieces = plan_of(gpu, gpu_memory_gb=80.0, global_batch_size=4096, micro_batch_size=256)
    assert make_row(pieces, 1).fits
    # a second forward of the same images
    assert pieces.step(1).parts["compute"] == pytest.approx(4 / 3 * plan.step(1).parts["compute"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bandwidth_gbps": 1.0}, "network"),
        ({"latency_us": 2000.0}, "latency"),
        ({"storage_mb_per_sec": 400.0, "storage": "shared"}, "storage"),
        ({"global_batch_size": 512, "bandwidth_gbps": math.inf, "latency_us": 0.0}, "optimizer"),
    ],
)
def test_where_it_stops_and_why(gpu, options, reason):
    plan = plan_of(gpu, **{"global_batch_size": 4096} | options)
    limit = find_limit(plan)
    assert limit.reason == reason
    assert limit.beyond == 2 * limit.gpus
    assert limit.efficiency >= 0.7 > limit.efficiency_beyond
    # what is lost makes up the whole of what efficiency lacks, where no part got cheaper
    assert sum(lost_shares(plan, limit.beyond).values()) == pytest.approx(1 - limit.efficiency_beyond, abs=0.02)


def test_nothing_stops_a_plan_without_obstacles(gpu):
    free = {"bandwidth_gbps": math.inf, "intra_node_gbps": math.inf, "latency_us": 0.0, "intra_node_latency_us": 0.0}
    limit = find_limit(plan_of(gpu, local_batch_size=256, **free))
    assert (limit.gpus, limit.reason, limit.beyond) == (4096, None, None)


def test_what_fits_into_hours_and_budget(gpu):
    asked = {"global_batch_size": 4096, "price_per_gpu_hour": 2.5, "gpus": (1, 2, 4, 8, 16, 32, 64)}
    plan = plan_of(gpu, **asked)
    rows = [make_row(plan, gpus) for gpus in plan.gpus]
    assert what_fits(replace(plan, config=replace(plan.config, hours=10.0)), rows).step.gpus == 4
    fastest = what_fits(replace(plan, config=replace(plan.config, budget=80.0)), rows)
    assert fastest.step.gpus == max(row.step.gpus for row in rows if row.cost <= 80.0)
    assert what_fits(replace(plan, config=replace(plan.config, hours=10.0, budget=1.0)), rows) is None


def test_another_batch_tells_what_a_step_costs_beside_its_images():
    """Forward and backward of 64 images take 75 ms of 80, of 16 images 30: 15 ms are fixed, 15/16 ms each image's."""
    run = run_config()
    parts = {"forward": 0.025, "backward": 0.050, "optimizer": 0.005}
    large = profile(run=run, seconds=parts, loading=1e6, training=800.0, together=800.0)
    few = {"forward": 0.010, "backward": 0.020, "optimizer": 0.005}
    small = profile(run=run_config(batch=16), seconds=few, loading=1e6, training=16 / 0.035, together=16 / 0.035)
    plan = plan_of(large, small)
    assert plan.costs.fixed_s == pytest.approx(0.015)
    assert plan.costs.slope_s == pytest.approx(0.060 / 64)
    assert plan.step(1).images_per_sec == pytest.approx(800.0, rel=1e-9)
    # half of the images, as much for the fixed part
    computing = sum(plan.step(2).parts[name] for name in ("compute", "batch")) / plan.costs.residual
    assert computing == pytest.approx(0.045)


def test_a_wider_profile_tells_links_and_crowding():
    """On two ranks 32 images each take 45 ms where 37.5 were due: a fifth more; and communication takes 20 ms."""
    one = profile()
    parts = {"decode": 0.02, "forward": 0.015, "backward": 0.030, "loss": 0.001, "communication": 0.020}
    parts |= {"optimizer": 0.003}
    two = profile(ranks=2, seconds=parts, training=64 / 0.069, together=64 / 0.070)
    plan = plan_of(one, two)
    assert plan.costs.crowding == pytest.approx(0.2)
    talk = sum(plan.step(2).parts[name] for name in ("network", "latency")) / plan.costs.residual
    assert talk == pytest.approx(0.020)
    assert plan.step(1).images_per_sec == pytest.approx(640.0, rel=1e-9)
    assert len(plan.remarks) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_name": "another"}, "`--profile` must name profiles of one run, got device_name by hand and another"),
        ({"training_images_per_sec": math.nan}, "`--profile` must hold rates above 0"),
        ({"global_batch_size": 7}, "`--profile` must have a global batch of 1 times its local one"),
        ({"config": {"name": 3}}, "the profile's `config` is no run's of this version"),
        ({"stages": {}}, "a profile must hold the stages `forward` and `backward`"),
    ],
)
def test_profiles_that_do_not_go_are_named(change, words):
    good = profile()
    bad = changed(good, **change)
    profiles = (good, bad) if "device_name" in change else (bad,)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        plan_of(*profiles)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": (3,)}, "`--gpus` must divide the global batch of 64 images, got 3; use 2"),
        ({"cpu_cores_per_gpu": 2.0}, "`--cpu-cores-per-gpu` needs a GPU's profile"),
        ({"depth": 51}, "`model.encoder.depth` must be one of"),
    ],
)
def test_plans_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        plan_of(profile(), **options)
