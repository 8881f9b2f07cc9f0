"""Linear heads trained at once against plain torch: one `nn.Linear` and one `torch.optim.SGD` for each head."""

import math

import pytest
import torch
from torch import nn

from pipelines.order import epoch_order
from train.evaluation import linear_probe
from train.evaluation.linear_probe import Head, LinearHeads, Rows, train_heads

SAMPLES, WIDTH, CLASSES, BATCH, EPOCHS = 90, 13, 5, 16, 4
SEED, INIT_STD = 3, 0.05
RATES, DECAYS = (0.1, 2.0), (0.0, 1e-2)
HEADS = [
    Head(base_lr=rate, weight_decay=decay, skips_held_out=skips)
    for rate in RATES
    for decay in DECAYS
    for skips in (True, False)
]


def samples():
    """Representations about the centre of their class, labels, and which rows are held out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    return centres[labels] + torch.randn(SAMPLES, WIDTH, generator=generator), labels, torch.arange(SAMPLES) % 7 == 0


class MemoryFeed:
    """Shuffled batches of tensors."""

    global_batch_size = BATCH

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x) // BATCH

    def epoch(self, epoch):
        order = torch.from_numpy(epoch_order(SEED, epoch, len(self.x)))
        for rows in order[: len(self) * BATCH].split(BATCH):
            yield Rows(x=self.x[rows], labels=self.labels[rows], indices=rows)


def make_heads(heads=HEADS):
    return LinearHeads(heads, WIDTH, CLASSES, init_std=INIT_STD, seed=SEED)


def trained(heads=HEADS):
    x, labels, held_out = samples()
    found, told = make_heads(heads), []
    train_heads(
        found,
        MemoryFeed(x, labels),
        epochs=EPOCHS,
        held_out=held_out,
        after_epoch=lambda epochs, losses: told.append((epochs, losses)),
    )
    assert [epochs for epochs, _ in told] == [1, 2, 3, 4]
    return found, told[-1][1]


def plain_torch(head):
    """The same head alone: the layer, and its mean loss over the last epoch."""
    x, labels, held_out = samples()
    feed = MemoryFeed(x, labels)
    layer = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(SEED)) * INIT_STD)
        layer.bias.zero_()
    groups = [{"params": [layer.weight], "weight_decay": head.weight_decay}, {"params": [layer.bias]}]
    peak, total = head.base_lr * BATCH / 256, EPOCHS * len(feed)
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    for epoch in range(EPOCHS):
        losses = []
        for rows in feed.epoch(epoch):
            kept = ~held_out[rows.indices] if head.skips_held_out else slice(None)
            loss = nn.functional.cross_entropy(layer(rows.x[kept]), rows.labels[kept])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return layer, sum(losses) / len(losses)


def assert_is_plain_torch(found, losses):
    for i, head in enumerate(found.heads):
        layer, loss = plain_torch(head)
        torch.testing.assert_close(found.weight[i], layer.weight.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.bias[i], layer.bias.detach(), rtol=1e-6, atol=1e-6)
        assert losses[i] == pytest.approx(loss, rel=1e-5)


def test_each_head_is_what_torch_trains_alone():
    found, losses = trained()
    assert_is_plain_torch(found, losses)
    assert found.diverged() == [False] * len(HEADS)
    weights = [tuple(weight.flatten().tolist()) for weight in found.weight]
    assert len(set(weights)) == len(HEADS), "every head must differ from the others, or the test compares less"


def test_rows_in_pieces_are_as_the_whole(monkeypatch):
    """ImageNet's logits of all heads would not fit: a batch is worked off a few rows at a time."""
    monkeypatch.setattr(linear_probe, "LOGIT_BYTES", 3 * len(HEADS) * CLASSES * 4)
    assert_is_plain_torch(*trained())


def test_a_head_that_diverges_leaves_the_others_alone():
    found, losses = trained([HEADS[0], Head(base_lr=1e38, weight_decay=1.0), HEADS[-1]])
    assert found.diverged() == [False, True, False]
    assert not math.isfinite(losses[1])
    healthy, _ = trained([HEADS[0], HEADS[1], HEADS[-1]])
    assert torch.equal(found.weight[[0, 2]], healthy.weight[[0, 2]])
    assert torch.equal(found.bias[[0, 2]], healthy.bias[[0, 2]])


def test_a_batch_that_is_held_out_as_a_whole_moves_nothing():
    x, labels, _ = samples()
    heads = make_heads([HEADS[0]])
    before = heads.weight.clone()
    loss = heads.step(x, labels, torch.ones(SAMPLES, dtype=torch.bool), lr_factor=1.0)
    assert torch.equal(heads.weight, before)
    assert loss.tolist() == [0.0]


def test_scores_are_those_of_the_head():
    x, _, _ = samples()
    found, _ = trained()
    layer, _ = plain_torch(HEADS[5])
    torch.testing.assert_close(found.scores(x, 5), layer(x).detach(), rtol=1e-5, atol=1e-5)
