"""Weighted kNN against a brute-force float64 one, against scikit-learn's, and on votes worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from train.evaluation import knn
from train.evaluation.exact_products import exact_products
from train.evaluation.knn import knn_accuracy, knn_predict, nearest, votes


def clusters(num, seed, *, width=24, classes=7, dtype=torch.float64):
    """Overlapping clusters, so that many votes are close."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    noise = torch.randn(num, width, generator=generator, dtype=torch.float64)
    return (centres[labels] + 2.5 * noise).to(dtype), labels


def brute_force(train_x, train_y, test_x, k, temperature):
    """One sample and one neighbour after the other, in float64."""
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (train_x, test_x)]
    predictions = []
    for sample in unit[1]:
        similarities = [float(np.dot(sample, other)) for other in unit[0]]
        nearest = sorted(range(len(similarities)), key=lambda i: (-similarities[i], i))[:k]
        votes = {}
        for i in nearest:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + math.exp(similarities[i] / temperature)
        predictions.append(min(votes, key=lambda label: (-votes[label], label)))
    return torch.tensor(predictions)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (41, 0.5), (401, 0.07)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_brute_force(k, temperature, dtype):
    train_x, train_y = clusters(401, seed=1, dtype=dtype)
    test_x, test_y = clusters(153, seed=2, dtype=dtype)
    expected = brute_force(train_x, train_y, test_x, k, temperature)
    assert torch.equal(knn_predict(train_x, train_y, test_x, k=k, temperature=temperature), expected)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, k=k, temperature=temperature)
    assert accuracy == float((expected == test_y).double().mean())
    assert 0.2 < accuracy < 0.9, "the comparison needs a problem that is neither trivial nor hopeless"


def test_against_scikit_learn():
    train_x, train_y = clusters(800, seed=3)
    test_x, _ = clusters(300, seed=4)
    peer = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(train_x.numpy(), train_y.numpy())
    expected = torch.from_numpy(peer.predict(test_x.numpy()))
    assert torch.equal(knn_predict(train_x, train_y, test_x, k=20, temperature=0.07), expected)


@pytest.mark.parametrize(("test_rows", "train_rows"), [(7, 64), (152, 128), (153, 192)])
def test_blocks_change_nothing(monkeypatch, test_rows, train_rows):
    """Blocks of fewer training rows than neighbours, and edges of blocks among the neighbours."""
    train_x, train_y = clusters(401, seed=1)
    test_x, _ = clusters(153, seed=2)
    whole = nearest(train_x, test_x, 100)
    monkeypatch.setattr(knn, "TEST_ROWS", test_rows)
    monkeypatch.setattr(knn, "TRAIN_ROWS", train_rows)
    values, rows = nearest(train_x, test_x, 100)
    assert torch.equal(rows, whole[1])
    torch.testing.assert_close(values, whole[0], rtol=0, atol=1e-15)
    assert torch.equal(knn_predict(train_x, train_y, test_x, k=100), brute_force(train_x, train_y, test_x, 100, 0.07))


def signs(num, seed):
    """Rows of ±1 in 16 dimensions: their similarities are multiples of 1/8, exactly, and tie very often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (num, 16), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("train_rows", [64, 4096])
@pytest.mark.parametrize("k", [1, 5, 80, 300])
def test_neighbours_that_tie_stand_in_their_order(monkeypatch, train_rows, k):
    """Within a block and over the edges of blocks; with tied rows settled a few at a time."""
    monkeypatch.setattr(knn, "TRAIN_ROWS", train_rows)
    monkeypatch.setattr(knn, "TIED_ROWS", 7)
    train_x, test_x = signs(300, seed=1), signs(41, seed=2)
    values, rows = nearest(train_x, test_x, k)
    similarity = (test_x @ train_x.T / 16).numpy()
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert np.array_equal(rows.numpy(), expected)
    assert np.array_equal(values.numpy(), np.take_along_axis(similarity, expected, axis=1))


@pytest.mark.parametrize(("num", "num_test", "train_rows"), [(1001, 1, 4096), (65, 33, 128), (301, 33, 128)])
def test_copies_of_a_feature_are_equally_near_wherever_they_stand(monkeypatch, num, num_test, train_rows):
    """In float32, by products that round: the first rows count, whatever the widths of the last block."""
    monkeypatch.setattr(knn, "TRAIN_ROWS", train_rows)
    generator = torch.Generator().manual_seed(0)
    train_x = torch.randn(1, 512, generator=generator).repeat(num, 1)
    values, rows = nearest(train_x, torch.randn(num_test, 512, generator=generator), num)
    assert (values == values[:, :1]).all()
    assert torch.equal(rows, torch.arange(num).expand(num_test, num))


def test_fewer_neighbours_are_the_first_of_more():
    train_x, train_y = clusters(401, seed=1)
    test_x, _ = clusters(153, seed=2)
    values, rows = nearest(train_x, test_x, 200)
    few = nearest(train_x, test_x, 20)
    assert torch.equal(values[:, :20], few[0])
    assert torch.equal(rows[:, :20], few[1])
    for k, temperature in ((20, 0.07), (200, 0.1)):
        scores = votes(values[:, :k], train_y[rows[:, :k]], temperature=temperature, num_classes=7)
        assert torch.equal(scores.argmax(dim=1), brute_force(train_x, train_y, test_x, k, temperature))


def test_memory_does_not_grow_with_the_training_set(monkeypatch, tmp_path):
    """Of a map of a file: what torch allocates at once, counted by its own profiler."""
    monkeypatch.setattr(knn, "TEST_ROWS", 32)
    monkeypatch.setattr(knn, "TRAIN_ROWS", 256)
    most = {}
    for num in (2_000, 16_000):
        path = tmp_path / f"{num}.npy"
        np.save(path, clusters(num, seed=1, dtype=torch.float32)[0].numpy())
        train_x = torch.from_numpy(np.load(path, mmap_mode="c"))
        test_x, _ = clusters(100, seed=2, dtype=torch.float32)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            nearest(train_x, test_x, 50)
        held, peak = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        most[num] = peak
    assert 0 < most[16_000] <= 1.1 * most[2_000]
    assert most[16_000] < 16_000 * 24 * 4, "less than the set itself"


def test_products_are_exact_whatever_is_allowed(monkeypatch):
    train_x, _ = clusters(401, seed=1, dtype=torch.float32)
    test_x, _ = clusters(153, seed=2, dtype=torch.float32)
    expected = nearest(train_x, test_x, 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest(train_x, test_x, 20)
            with exact_products(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        # one neighbour of class 1 at similarity 0.8, two of class 0 at 0.6: 1 against 2 · exp(−0.2 / τ)
        (0.07, 1),  # 2 · 0.0574 = 0.11
        (0.2885, 1),  # 2 · 0.49995 < 1: just below 0.2 / ln 2 = 0.288539
        (0.2886, 0),  # 2 · 0.50007 > 1
        (1.0, 0),  # 2 · 0.8187 = 1.64
        (0.0005, 1),  # exp(0.8 / τ) overflows
    ],
)
def test_votes_worked_out_by_hand(temperature, expected):
    train_x = torch.tensor([[3.0, 4.0], [6.0, -8.0], [4.0, 3.0], [-1.0, 0.0]], dtype=torch.float64)
    train_y = torch.tensor([0, 0, 1, 2])
    test_x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert knn_predict(train_x, train_y, test_x, k=3, temperature=temperature).tolist() == [expected]


@pytest.mark.parametrize("copies", [4, 50, 100, 1000])
@pytest.mark.parametrize("k", [3, 20])
def test_equal_neighbours_count_in_their_order(copies, k):
    """Of many copies of one feature the first k vote: one more than half of them for class 4."""
    k = min(k, copies - 1)
    train_x = torch.tensor([[1.0, 2.0]]).repeat(copies, 1)
    train_y = torch.ones(copies, dtype=torch.int64)
    train_y[:k] = torch.tensor([4] * (k // 2 + 1) + [2] * (k - k // 2 - 1))
    assert knn_predict(train_x, train_y, torch.tensor([[2.0, 1.0]] * 5), k=k).tolist() == [4] * 5


def test_a_nearer_neighbour_leaves_the_first_of_the_equal_ones():
    train_x = torch.tensor([[1.0, 2.0]]).repeat(100, 1)
    train_y = torch.tensor([2, 2] + [1] * 98)
    train_x[70], train_y[70] = torch.tensor([2.0, 1.0]), 3
    nearest_alone = {"k": 3, "temperature": 0.07}
    assert knn_predict(train_x, train_y, torch.tensor([[2.0, 1.0]]), **nearest_alone).tolist() == [3]
    two_against_one = {"k": 3, "temperature": 10.0}
    assert knn_predict(train_x, train_y, torch.tensor([[2.0, 1.0]]), **two_against_one).tolist() == [2]


def test_equal_votes_go_to_the_lowest_class():
    train_x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert knn_predict(train_x, torch.tensor([5, 2, 0]), train_x[:1], k=2).tolist() == [2]


def test_half_precision_features_are_compared_in_float32():
    train_x, train_y = clusters(401, seed=1)
    test_x, _ = clusters(153, seed=2)
    train_x, test_x = train_x.bfloat16(), test_x.bfloat16()
    expected = brute_force(train_x, train_y, test_x, 20, 0.07)
    assert torch.equal(knn_predict(train_x, train_y, test_x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "`k` must be between 1 and 4, the number of training samples, got 0; take fewer neighbours"),
        ({"k": 5}, "`k` must be between 1 and 4, the number of training samples, got 5; take fewer neighbours"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0; DINO's is 0.07"),
        (
            {"test_x": torch.tensor([[1.0, 2.0], [math.nan, 1.0]])},
            "test features must be finite, got NaN or infinity in 1 of 2 samples, first 1; the encoder has diverged",
        ),
        (
            {"train_y": torch.zeros(3, dtype=torch.int64)},
            "training features must be [N, D] with one label each and N ≥ 1, got [4, 2] with labels [3]",
        ),
        ({"test_y": torch.tensor([0, -1])}, "test labels must be integers from 0, got torch.int64 from -1"),
        ({"test_x": torch.ones(2, 3)}, "features must have one width, got 2 and 3"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "train_x": torch.eye(2).repeat(2, 1),
        "train_y": torch.tensor([0, 1, 0, 1]),
        "test_x": torch.eye(2),
        "test_y": torch.tensor([0, 1]),
        "k": 2,
    } | change
    with pytest.raises(ValueError) as caught:
        knn_accuracy(**arguments)
    assert str(caught.value) == message
