import numpy as np

from pipelines.rng import bits, key_of, uniform


def test_draws_are_splitmix64s_published_outputs():
    # The outputs of Vigna's splitmix64.c for the seed 1234567, as listed on Rosetta Code ("Pseudo-random
    # numbers/Splitmix64").
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits(np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64)).tolist() == expected


def test_a_key_depends_on_every_part_of_the_address_and_on_their_order():
    addresses = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (0, 1, 1, 0),
        (0, 0, 0),
        (-1, 0, 0, 0),
    ]
    assert len({int(key_of(*address)[0]) for address in addresses}) == len(addresses)


def test_keys_broadcast_over_samples():
    samples = np.array([3, 1_281_166], np.int64)
    assert key_of(7, 2, samples, 1).tolist() == [int(key_of(7, 2, int(s), 1)[0]) for s in samples]


def test_keys_of_the_first_version_never_change():
    # Worked out in plain Python integers: every view of every run hangs on them.
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = 0
    for word in (42, 3, 1000, 1):
        key = mix(((key ^ word) + 0x9E3779B97F4A7C15) % 2**64)
    assert int(key_of(42, 3, 1000, 1)[0]) == key


def test_uniform_is_uniform_and_uncorrelated():
    num = 200_000
    keys = key_of(5, 0, np.arange(num, dtype=np.int64), 0)
    first, second = uniform(keys, 0), uniform(keys, 1)
    assert first.min() >= 0.0
    assert first.max() < 1.0
    # Standard errors: mean 1/sqrt(12 n), variance 1/sqrt(180 n), correlation 1/sqrt(n); five of each.
    assert abs(first.mean() - 0.5) < 5 / np.sqrt(12 * num)
    assert abs(first.var() - 1 / 12) < 5 / np.sqrt(180 * num)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(num)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / np.sqrt(num)
    counts = np.histogram(first, bins=100, range=(0, 1))[0]
    chi_squared = ((counts - num / 100) ** 2 / (num / 100)).sum()
    assert 99 - 5 * np.sqrt(2 * 99) < chi_squared < 99 + 5 * np.sqrt(2 * 99)
