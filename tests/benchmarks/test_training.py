"""Both sides of the training contest do the same work: network, loss, gradients, steps, schedule and augmentation."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from benchmarks.training_work import EpochAfterEpoch, our_loader, read_config, settings_of
from model.build import build_method
from pipelines.augment import build_recipe
from tests.benchmarks.training_cases import BATCH_SIZE, NUM_IMAGES, ROOT, SIDE, raw_set, tiny
from tests.pipelines.betons import natural_image
from train.optim.lars import LARS, peak_lr
from train.optim.param_groups import param_groups
from train.schedule import learning_rate

pytest.importorskip("lightly", reason="the peer needs requirements-bench.txt")

from benchmarks.peers.lightly_training import Training, load_weights_, simclr_transform

CONFIGS = ["digits_demo", "study_cifar10"]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return raw_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def config(beton, tmp_path):
    return tiny(beton, tmp_path)


def views(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(BATCH_SIZE, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2)]


def by_our_names(model):
    """The peer's parameters under the names of ours: the encoder's are alike, the head's follow in order."""
    encoder = {f"encoder.{name}": parameter for name, parameter in model.backbone.named_parameters()}
    return encoder | dict(enumerate(p for p in model.projection_head.parameters() if p.requires_grad))


def by_name(method):
    encoder = {f"encoder.{name}": parameter for name, parameter in method.encoder.named_parameters()}
    return encoder | dict(enumerate(method.projection_head.parameters()))


def assert_alike(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).norm() / tensor.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("changes", [[], ["--model.encoder.stem=imagenet", "--model.projection_head.num_layers=3"]])
def test_loss_and_gradients_are_the_same(beton, tmp_path, changes):
    config = tiny(beton, tmp_path, *changes)
    method = open_blocks_(build_method(config.model, config.seed).double())
    settings = settings_of(config)
    training = Training(settings, [], steps_per_epoch=1)
    model = training.model.double()
    load_weights_(model, method.state_dict())
    ours, _ = method(views(0))
    theirs = training.criterion(*model(views(0)))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    ours.backward()
    theirs.backward()
    gradients = [{name: p.grad for name, p in named.items()} for named in (by_name(method), by_our_names(model))]
    assert len(gradients[0]) == sum(1 for _ in method.parameters())
    assert_alike(*gradients, 1e-9)


def test_steps_are_the_same(beton, tmp_path):
    """Six of them, decay and momentum included, at the rates of the peer's own scheduler.

    Everything is in float64 but the peer's loss, whose float32 leaves 2e-6 after so many steps.
    """
    config = tiny(beton, tmp_path, "--optim.weight_decay=0.05")
    method = build_method(config.model, config.seed).double()
    training = Training(settings_of(config), [], steps_per_epoch=2)
    model = training.model.double()
    start = {name: parameter.detach().clone() for name, parameter in by_name(method).items()}
    optim = config.optim
    optimizer = LARS(
        param_groups(method, optim.weight_decay),
        momentum=optim.momentum,
        trust_coefficient=optim.trust_coefficient,
        form=optim.form,
    )
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = training.scheduler.get_last_lr()[0]
        optimizer.zero_grad()
        method(views(step))[0].backward()
        optimizer.step()
        training.step(views(step))
    assert_alike(by_name(method), by_our_names(model), 2e-5)
    moved = [(parameter - start[name]).norm() / start[name].norm() for name, parameter in by_name(method).items()]
    assert max(moved) > 0.01
    statistics = [value for name, value in method.encoder.state_dict().items() if "running" in name]
    theirs = [value for name, value in model.backbone.state_dict().items() if "running" in name]
    for ours, other in zip(statistics, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-8)


def test_the_schedules_differ_by_less_than_a_step_of_warm_up(config):
    steps_per_epoch = NUM_IMAGES // BATCH_SIZE
    total = config.train.epochs * steps_per_epoch
    training = Training(settings_of(config), [], steps_per_epoch=steps_per_epoch)
    peak, warmup = peak_lr(config.optim, BATCH_SIZE), 2 * steps_per_epoch
    theirs = []
    for _ in range(total):
        theirs.append(training.scheduler.get_last_lr()[0])
        training.optimizer.step()
        training.scheduler.step()
    ours = [
        learning_rate(step, config=config.schedule, peak_lr=peak, total_steps=total, steps_per_epoch=steps_per_epoch)
        for step in range(total)
    ]
    # Its warm-up is one step ahead; its decay ends with the last step, ours would end with the one after.
    assert theirs[:warmup] == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])
    decay = [(1 + math.cos(math.pi * i / (total - warmup - 1))) / 2 for i in range(total - warmup)]
    assert theirs[warmup:] == pytest.approx([peak * share for share in decay], abs=1e-12)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= peak / warmup + 1e-12
    assert max(theirs) == pytest.approx(peak)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_transform_has_the_recipes_ranges(beton, tmp_path, name):
    config = read_config(ROOT / f"configs/{name}.yaml", beton, tmp_path, "--data.global_batch_size=8")
    recipe = build_recipe(config.augment)
    transform = simclr_transform(settings_of(config))
    assert len(transform.transforms) == len(recipe.views) == 2
    for one, view in zip(transform.transforms, recipe.views, strict=True):
        crop, flip, vertical, rotation, jitter, gray, blur, *rest = one.transform.transforms
        assert tuple(crop.size) == (view.size, view.size)
        assert tuple(crop.scale) == view.crop_area
        assert tuple(crop.ratio) == view.crop_aspect
        assert InterpolationMode(crop.interpolation).value == view.interpolation
        assert crop.antialias
        assert (flip.p, vertical.p, rotation.prob) == (view.flip_prob, 0.0, 0.0)
        assert jitter.p == view.jitter_prob
        (colors,) = jitter.transforms
        for factor in ("brightness", "contrast", "saturation"):
            strength = getattr(view, factor)
            assert getattr(colors, factor) == pytest.approx((max(0.0, 1 - strength), 1 + strength))
        assert colors.hue == pytest.approx((-view.hue, view.hue))
        assert gray.p == view.gray_prob
        assert blur.prob == view.blur_prob == 0.0
        # Nothing but the conversion to float32 in [0, 1] follows, on either side.
        assert [type(step).__name__ for step in rest] in (["ToTensor"], ["Compose"])
        assert (recipe.mean, recipe.std) == ((0.0,) * 3, (1.0,) * 3)
        assert (view.solarize_prob, view.rotate_prob, view.sobel_prob, view.noise_prob, view.cutout_prob) == (0,) * 5


def test_the_views_are_of_one_kind(beton, tmp_path):
    """Brightness, contrast, colour and detail of many views of the same images: means within their errors."""
    config = tiny(beton, tmp_path, "--data.global_batch_size=20", "--train.epochs=50")
    transform = simclr_transform(settings_of(config))
    torch.manual_seed(0)
    images = [Image.fromarray(np.asarray(natural_image(SIDE, SIDE, i))) for i in range(NUM_IMAGES)]
    theirs = torch.stack([view for _ in range(50) for image in images for view in transform(image)])
    loader = EpochAfterEpoch(our_loader(config, 1))
    ours = torch.cat([view for _ in range(50) for batch in loader for view in batch])
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    for name, figure in KINDS.items():
        a, b = figure(ours).double(), figure(theirs).double()
        error = math.hypot(a.std().item(), b.std().item()) / len(a) ** 0.5
        assert abs(a.mean() - b.mean()).item() < 4 * error, name
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.15), name


KINDS = {
    "brightness": lambda views: views.mean((1, 2, 3)),
    "contrast": lambda views: views.mean(1).std((1, 2)),
    "colour": lambda views: (views.amax(1) - views.amin(1)).mean((1, 2)),
    "detail": lambda views: views.mean(1).diff(dim=-1).abs().mean((1, 2)),
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--augment.blur_prob=0.5", "augment"),
        ("--augment.interpolation=bicubic", "augment"),
        ("--augment.std=[0.5,0.5,0.5]", "augment.mean"),
        ("--model.encoder.depth=50", "model.encoder.depth"),
        ("--optim.form=classic", "optim.form"),
        ("--schedule.decay=linear", "schedule"),
    ],
)
def test_what_the_script_cannot_train_is_refused(beton, tmp_path, change, named):
    with pytest.raises(ValueError, match=rf"lightly's script does not train what {named} asks for"):
        settings_of(tiny(beton, tmp_path, change))


def open_blocks_(method):
    """γ = 1 everywhere: at the start those of the blocks' last norms are 0, and no gradient goes through a block."""
    for module in method.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1:
            torch.nn.init.ones_(weight)
    return method
