import numpy as np
import pytest

from pipelines.order import epoch_order, num_global_batches, rank_rows


def test_an_epoch_visits_every_sample_once_and_epochs_differ():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order) == list(range(1000))
    assert not (orders[0] == orders[1]).all()
    assert not (orders[0] == orders[2]).all()
    assert (epoch_order(0, 1, 1000) == orders[1]).all()


def test_evaluation_keeps_the_order_of_the_file():
    assert epoch_order(3, 5, 10, shuffle=False).tolist() == list(range(10))


def test_the_shuffle_is_unbiased():
    # Where sample 0 lands over many epochs: uniform over the positions (chi-squared, 9 degrees, five sigmas).
    num_epochs = 5000
    places = np.array([int(np.argmin(epoch_order(9, e, 10))) for e in range(num_epochs)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - num_epochs / 10) ** 2 / (num_epochs / 10)).sum() < 9 + 5 * np.sqrt(18)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_each_global_batch_without_gap_or_overlap(world_size, drop_last):
    num_samples, global_batch_size = 103, 12
    batches = num_global_batches(num_samples, global_batch_size, drop_last=drop_last)
    assert batches == (8 if drop_last else 9)
    for batch in range(batches):
        rows = [rank_rows(batch, global_batch_size, num_samples, rank, world_size) for rank in range(world_size)]
        covered = [i for part in rows for i in range(part.start, part.stop)]
        end = min((batch + 1) * global_batch_size, num_samples)
        assert covered == list(range(batch * global_batch_size, end))
        sizes = [part.stop - part.start for part in rows]
        assert max(sizes) - min(sizes) <= (
            0 if end % global_batch_size == 0 and global_batch_size % world_size == 0 else 1
        )
