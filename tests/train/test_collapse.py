"""Spread and rank of whole batches against NumPy in float64, on 1, 2 and 4 ranks; and when a warning comes."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from train.online.collapse import LOWEST_RANK, LOWEST_STD, PATIENCE, RECOVERED, CollapseWatch, Spread, measure_spread

ROWS, WIDTH, OUT = 52, 24, 9


def rows(kind):
    """h [G, D] and z [G, E]; the first ones with a large mean, as after a ReLU."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(ROWS, WIDTH, generator=generator) + 3.0
    z = torch.randn(ROWS, OUT, generator=generator) @ torch.diag(torch.linspace(0.1, 2.0, OUT)) + 0.5
    if kind == "a line":
        z = torch.outer(torch.linspace(-1, 1, ROWS), z[0])
    if kind == "points":
        h, z = h[:1].expand(ROWS, -1), z[:1].expand(ROWS, -1)
    if kind == "nothing":
        z = torch.zeros(ROWS, OUT)
    return h, z


def expected(h, z):
    h, z = h.double().numpy(), z.double().numpy()
    h = h / np.linalg.norm(h, axis=1, keepdims=True)
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    shares = np.linalg.eigvalsh(np.cov(z, rowvar=False, bias=True)).clip(min=0)
    shares = shares[shares > 1e-15] / shares.sum() if shares.sum() > 1e-9 else np.ones(0)
    rank = np.exp(-(shares * np.log(shares)).sum()) if len(shares) else 0.0
    return h.std(axis=0).mean() * np.sqrt(WIDTH), rank


def check_values(rank):
    """Ranks may hold different numbers of rows."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    cuts = [ROWS * i * i // world_size**2 for i in range(world_size + 1)]
    found = []
    for kind in ("any", "a line", "points", "nothing"):
        h, z = rows(kind)
        own = slice(cuts[rank], cuts[rank + 1])
        found.append(measure_spread(h[own], z[own])[:2])
        np.testing.assert_allclose(found[-1], expected(h, z), rtol=1e-9, atol=1e-7)
    assert found[1][1] == pytest.approx(1.0)
    assert found[2] == (pytest.approx(0.0, abs=1e-7), 0.0)
    assert found[3][1] == 0.0
    broken = rows("any")[0].clone()
    broken[-1, 0] = math.inf
    assert all(math.isnan(value) for value in measure_spread(broken[own], z[own])[:2])
    return found, measure_spread(h[own], z[own]).largest_rank


def test_values():
    assert check_values(0)[1] == OUT


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_values_over_ranks(world_size):
    results = run_ranks(check_values, world_size)
    assert all(result == results[0] for result in results)


def test_directions_are_counted():
    """k equal directions out of E: rank k."""
    for k in (1, 3, 8):
        z = torch.cat([torch.eye(OUT)[:k], -torch.eye(OUT)[:k]])
        assert measure_spread(z, z)[1] == pytest.approx(k)


def test_a_filled_sphere_has_spread_1():
    h = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert measure_spread(h, h)[0] == pytest.approx(1.0, abs=0.01)


GOOD, FLAT, THIN = (10 * LOWEST_STD, 10 * LOWEST_RANK), (LOWEST_STD / 2, 50.0), (0.5, LOWEST_RANK / 2)
BETWEEN = (LOWEST_STD * (1 + RECOVERED) / 2, 50.0)


def judged(caplog, figures, *, warmup_steps=0, largest_rank=128):
    """The warnings at steps 0, 1, …, as (step, words)."""
    watch, found = CollapseWatch(warmup_steps=warmup_steps), []
    for step, pair in enumerate(figures):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "train.online.collapse"):
            watch.judge(Spread(*pair, largest_rank), step)
        found += [(step, record.getMessage()) for record in caplog.records]
    return found


def test_one_warning_an_episode(caplog):
    figures = [GOOD, FLAT, FLAT, GOOD, FLAT, FLAT, FLAT]  # until 6
    figures += [FLAT, BETWEEN, BETWEEN, BETWEEN, GOOD, GOOD, FLAT, GOOD, GOOD, GOOD]  # until 16
    figures += [BETWEEN, BETWEEN, BETWEEN, THIN, THIN, THIN, THIN]  # until 23
    found = judged(caplog, figures)
    assert [step for step, _ in found] == [6, 16, 22]
    assert "step 6: the encoder collapses: the representations of all images are almost the same" in found[0][1]
    assert "step 16: the encoder tells images apart again" in found[1][1]
    assert "step 22: the encoder collapses: the projections of all images differ in hardly any direction" in found[2][1]


def test_nothing_is_said_in_the_warm_up_nor_of_what_is_not_finite(caplog):
    assert [step for step, _ in judged(caplog, [FLAT] * 9, warmup_steps=4)] == [4 + PATIENCE - 1]
    assert judged(caplog, [(math.nan, math.nan)] * 9) == []


@pytest.mark.parametrize(
    ("largest_rank", "rank", "warns"), [(128, 2.9, True), (8, 2.1, False), (8, 1.9, True), (3, 1.0, False)]
)
def test_narrow_projections_may_have_a_low_rank(caplog, largest_rank, rank, warns):
    assert bool(judged(caplog, [(0.5, rank)] * 9, largest_rank=largest_rank)) == warns


def test_pieces_are_one_batch(caplog):
    h, z = rows("any")
    whole = CollapseWatch(warmup_steps=0).measure(h, z, step=1)
    assert whole == CollapseWatch(warmup_steps=0).measure(list(h.split(20)), list(z.split(20)), step=1)
    assert whole == dict(zip(("representation_std", "projection_rank"), measure_spread(h, z)[:2], strict=True))
