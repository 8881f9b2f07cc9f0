"""Draws for tests, and the generator behind them in plain integers."""

import numpy as np
from scipy import stats

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.draw import draw_views

NUM = 24_000
SIGNIFICANT = 1e-6  # probability of a false alarm of one test; the draws are fixed, so it fails always or never
PHOTO = (500, 375)  # width, height


def draw(recipe, num=NUM, *, seed=0, epoch=0, first=0, size=PHOTO):
    """`VIEW_PARAMS` [num, V] of samples from `first` on, all of one size."""
    samples = np.arange(first, first + num)
    return draw_views(recipe, seed, epoch, samples, np.full(num, size[0], np.int32), np.full(num, size[1], np.int32))


def one_branch(*names, num=2000):
    recipe = build_recipe(AugmentConfig(recipe="one_branch", size=32, branch_transformations=names))
    params = draw(recipe, num)
    return recipe, params[:, 0], params[:, 1]


def assert_uniform(values, low, high):
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > SIGNIFICANT


def assert_probability(events, probability):
    assert stats.binomtest(int(events.sum()), len(events), probability).pvalue > SIGNIFICANT


# SplitMix64 (Steele, Lea, Flood 2014), and the hash of an address into its key.

MASK = 2**64 - 1


def plain_mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def plain_bits(key, number):
    return plain_mix(key + (number + 1) * 0x9E3779B97F4A7C15 & MASK)


def plain_key(*address):
    key = 0
    for word in address:
        key = plain_mix((key ^ word % 2**64) + 0x9E3779B97F4A7C15 & MASK)
    return key
