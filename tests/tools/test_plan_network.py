"""Collectives by hand: steps, bytes and latencies of rings and trees, on one machine and on several."""

import math

import pytest

from tools.plan_network import Link, Network, usual_network

NETWORK = Network(
    inside=Link(latency_s=1e-3, bytes_per_sec=1000.0),
    between=Link(latency_s=1e-2, bytes_per_sec=100.0),
    ranks_per_node=4,
    trees=False,
)


def test_a_ring_of_four_ranks_on_one_machine():
    # 6 steps, in each of which a rank passes a quarter of 2000 bytes on
    assert NETWORK.all_reduce_s(2000, 4) == pytest.approx(6 * (1e-3 + 500 / 1000))
    assert NETWORK.all_gather_s(2000, 4) == pytest.approx(3 * (1e-3 + 500 / 1000))
    assert NETWORK.pass_around_s(500, 4) == pytest.approx(3 * (1e-3 + 500 / 1000))


def test_eight_ranks_on_two_machines():
    # within each: 6 steps of 500 bytes; between them each rank 2 steps of half its quarter, all four over one link
    between = 2 * (1e-2 + 4 * 250 / 100)
    assert NETWORK.all_reduce_s(2000, 8) == pytest.approx(6 * (1e-3 + 0.5) + between)
    assert NETWORK.all_gather_s(2000, 8) == pytest.approx(3 * (1e-3 + 0.5) + (1e-2 + 1000 / 100))
    assert NETWORK.pass_around_s(500, 8) == pytest.approx(7 * (1e-2 + 500 / 100))
    assert NETWORK.shape(8) == (4, 2)


def test_one_rank_tells_nobody_anything():
    assert NETWORK.all_reduce_s(2000, 1) == NETWORK.all_gather_s(2000, 1) == NETWORK.pass_around_s(2000, 1) == 0


def test_trees_need_fewer_steps_and_move_as_many_bytes():
    tree = Network(inside=NETWORK.inside, between=NETWORK.between, ranks_per_node=64, trees=True)
    ring = Network(inside=NETWORK.inside, between=NETWORK.between, ranks_per_node=64, trees=False)
    assert ring.latency_s(64) == pytest.approx(126e-3)
    assert tree.latency_s(64) == pytest.approx(12e-3)
    assert tree.latency_s(2) == ring.latency_s(2) == pytest.approx(2e-3)
    assert tree.all_reduce_s(6400, 64) - tree.latency_s(64) == pytest.approx(2 * 63 / 64 * 6.4)


def test_scaled_links_take_that_many_times_as_long():
    for ranks in (3, 9):
        slower = NETWORK.scaled(3.0, ranks=ranks)
        assert slower.all_reduce_s(2000, ranks) == pytest.approx(3 * NETWORK.all_reduce_s(2000, ranks))
    assert NETWORK.scaled(3.0, ranks=4).between == NETWORK.between


def test_endless_bandwidth_leaves_the_latencies():
    endless = Network(
        inside=Link(latency_s=1e-3, bytes_per_sec=math.inf),
        between=Link(latency_s=1e-2, bytes_per_sec=math.inf),
        ranks_per_node=4,
        trees=False,
    )
    assert endless.all_reduce_s(1e12, 8) == pytest.approx(6e-3 + 2e-2) == endless.latency_s(8)


def test_resnet50s_gradients_on_eight_machines():
    """102 MB in float32 over 100 Gbit/s, of which 80 % arrive: 2 · 7/8 · 102.4e6 / 10e9 s, and 0.9 ms by NVLink."""
    seconds = usual_network("cuda", 8).all_reduce_s(4 * 25.6e6, 64)
    assert seconds == pytest.approx(2 * 7 / 8 * 102.4e6 / 10e9 + 2 * 7 / 8 * 102.4e6 / 200e9, rel=0.01)
