"""Which parameters LARS decays and adapts, and optimizer state by name."""

import pytest
import torch
import torchvision
from torch import nn

from train.optim.lars import LARS
from train.optim.param_groups import load_state_by_name, param_groups, state_by_name


class Everything(nn.Module):
    """One layer of each kind that matters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm([4, 5])  # a norm of two dimensions
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 2, bias=False)
        self.tied = self.head
        self.temperature = nn.Parameter(torch.tensor(0.1))


def test_biases_and_norms_are_neither_decayed_nor_adapted():
    adapted, plain = param_groups(Everything(), weight_decay=1e-4)
    assert adapted["param_names"] == ["conv.weight", "head.weight"]
    assert (adapted["weight_decay"], adapted["adapt"]) == (1e-4, True)
    assert plain["param_names"] == [
        "temperature",
        "conv.bias",
        *(f"{norm}.{name}" for norm in ("norm", "group", "layer") for name in ("weight", "bias")),
    ]
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)


def test_some_are_decayed_and_not_adapted():
    adapted, decayed, plain = param_groups(Everything(), weight_decay=1e-4, not_adapted=("head.",))
    assert adapted["param_names"] == ["conv.weight"]
    assert decayed["param_names"] == ["head.weight"]
    assert (decayed["weight_decay"], decayed["adapt"]) == (1e-4, False)
    decayed, again = param_groups(Everything(), weight_decay=1e-4, not_adapted=("",))
    assert decayed["param_names"] == ["conv.weight", "head.weight"]
    assert not decayed["adapt"]
    assert again["param_names"] == plain["param_names"]


def test_without_adaptation_it_is_torchs_momentum_sgd():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(2))
    for value in ours.state_dict().values():
        nn.init.normal_(value, std=0.3, generator=generator)
    theirs.load_state_dict(ours.state_dict())
    groups = param_groups(ours, 1e-2, not_adapted=("",))
    optimizer = LARS(groups, lr=0.01, momentum=0.9, nesterov=True, backend="reference")
    weights = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    sgd = torch.optim.SGD(
        [{"params": weights, "weight_decay": 1e-2}, {"params": biases}], lr=0.01, momentum=0.9, nesterov=True
    )
    for _ in range(5):
        x = torch.randn(8, 4, generator=generator)
        for model, stepper in ((ours, optimizer), (theirs, sgd)):
            stepper.zero_grad()
            model(x).square().mean().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_resnet50_has_54_adapted_and_107_plain_tensors():
    adapted, plain = param_groups(torchvision.models.resnet50(), weight_decay=1e-6)
    assert (len(adapted["params"]), len(plain["params"])) == (
        54,
        107,
    )  # 53 convolutions + fc; 53 norms × 2 + a bias


def test_a_module_without_biases_and_norms_gives_one_group():
    groups = param_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)
    assert [group["param_names"] for group in groups] == [["weight"]]
    assert len(LARS(groups).param_groups) == 1


def trained(seed):
    torch.manual_seed(0)  # the same weights each time
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.5)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return model, optimizer


def test_state_by_name_goes_on_bit_for_bit():
    model, optimizer = trained(seed=1)
    optimizer.step()
    saved = {name: {slot: t.clone() for slot, t in slots.items()} for name, slots in state_by_name(optimizer).items()}
    assert set(saved) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert saved["0.weight"]["momentum"].shape == (3, 2, 2, 2)

    other_model, other_optimizer = trained(seed=1)
    other_model.load_state_dict(model.state_dict())
    contiguous = {name: {slot: t.contiguous() for slot, t in slots.items()} for name, slots in saved.items()}
    load_state_by_name(other_optimizer, contiguous)
    buffer = other_optimizer.state[other_model[0].weight]["momentum"]
    assert buffer.stride() == other_model[0].weight.stride()
    optimizer.step()
    other_optimizer.step()
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(contiguous["0.weight"]["momentum"], saved["0.weight"]["momentum"]), "a copy was loaded"


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    _, optimizer = trained(seed=1)
    optimizer.step()
    before = state_by_name(optimizer)
    with pytest.raises(ValueError, match=r"optimizer state `2\.weight` belongs to no parameter here; resume with"):
        load_state_by_name(optimizer, {"0.weight": {"momentum": torch.zeros(3, 2, 2, 2)}, "2.weight": {}})
    with pytest.raises(ValueError, match=r"`1.bias.momentum` must have shape \[3\], got \[4\]; resume with"):
        load_state_by_name(optimizer, {"1.bias": {"momentum": torch.zeros(4)}})
    after = state_by_name(optimizer)
    assert all(after[name]["momentum"] is slots["momentum"] for name, slots in before.items())
