"""The training contest: one configuration for everyone, and who takes part.

From lightly's script to ours each contestant changes one thing:

- `lightly`: the script of `benchmarks.peers.lightly_training`, in torch's default memory format;
- `lightly_layout`: its network channels_last, and freed memory kept by the process, as our trainer does;
- `lightly_views`: that, fed by our loader; lightly's loss and LARS, a plain loop;
- `twinview`: our loss, LARS, engine, metrics and checkpoints too: `train.run.train` as it is;
- `twinview_folder`: ours with torchvision's way of loading, `data.loader` folder, in place of our loader.

Everyone has the same cores for everything it does. LARS has lightly's form on both sides (`optim.form` larc).
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestant import Contestant, Run
from benchmarks.peers.lightly_training import Settings, Training, data_loader
from benchmarks.training_twinview import images_of_epoch, take_cores, twinview_training
from model.build import build_method
from model.resnet import BASIC_DEPTHS, NUM_BLOCKS, STEM_WIDTH
from pipelines.augment import build_recipe
from pipelines.batch import Loader
from pipelines.build import Subset, build_loader, open_data
from train.config import PretrainConfig, parse_pretrain_config
from train.optim.lars import peak_lr
from train.runtime import keep_freed_memory
from train.schedule import num_warmup_steps

ROOT = Path(__file__).parents[1]
# Of the demo in float32. Who keeps freed memory holds its activations as long as it lives; others take them in turns.
OURS_MIB, FOLDER_MIB = 1600.0, 2500.0
SCRIPT_MIB, KEPT_MIB = 400.0, 700.0
DIGITS = "from pathlib import Path; from tools.digits import write_digits; import sys; write_digits(Path(sys.argv[1]))"


@dataclass(frozen=True, kw_only=True)
class Script:
    """How lightly's script is run."""

    threads: int
    """That the process computes with."""
    workers: int = 0
    """Processes of its DataLoader."""
    layout: bool = False
    """The network channels_last, and freed memory kept."""
    our_views: bool = False
    """From our loader, on so many threads as cores."""
    weights: Path | None = None
    """Where the backbone's weights go when the last epoch is done."""


def read_config(file: Path, beton: Path, runs_dir: Path, *overrides: str) -> PretrainConfig:
    """A configuration as a contest takes it: LARS in lightly's form, float32 or bfloat16 as the file says."""
    return parse_pretrain_config(
        [
            f"--config={file}",
            f"--data.path={beton}",
            f"--runs_dir={runs_dir}",
            "--optim.form=larc",
            "--train.device=cpu",
            *overrides,
        ]
    )


def settings_of(config: PretrainConfig) -> Settings:
    """What lightly's script is told, so that it trains what `config` says.

    Raises:
        ValueError: it has no way to.
    """
    encoder, head, augment = config.model.encoder, config.model.projection_head, config.augment
    view = build_recipe(augment).views[0]
    unlike = {
        "model.encoder.depth": encoder.depth in BASIC_DEPTHS,
        "model.encoder.stem": encoder.stem in ("imagenet", "cifar"),
        "model.loss": config.model.loss == "nt_xent",
        "optim.form": config.optim.form == "larc" and not config.optim.nesterov,
        "schedule": config.schedule.decay == "cosine" and config.schedule.every == "step",
        "augment": augment.recipe == "simclr" and augment.interpolation == "bilinear" and view.blur_prob == 0.0,
        "augment.mean": augment.mean == (0.0,) * 3 and augment.std == (1.0,) * 3,
    }
    strange = [name for name, same in unlike.items() if not same]
    if strange:
        raise ValueError(f"lightly's script does not train what {', '.join(strange)} asks for")
    data = open_data(config.data)
    steps_per_epoch = data.num_samples // config.data.global_batch_size
    total_steps = config.train.epochs * steps_per_epoch
    return Settings(
        beton=Path(config.data.path),
        rows=data.rows if isinstance(data, Subset) else None,
        batch_size=config.data.global_batch_size,
        epochs=config.train.epochs,
        warmup_steps=num_warmup_steps(config.schedule, steps_per_epoch=steps_per_epoch, total_steps=total_steps),
        lr=peak_lr(config.optim, config.data.global_batch_size),
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        trust_coefficient=config.optim.trust_coefficient,
        temperature=config.model.temperature,
        precision=config.train.precision,
        transform={
            "input_size": view.size,
            "min_scale": view.crop_area[0],
            "hf_prob": view.flip_prob,
            "cj_prob": view.jitter_prob,
            "cj_strength": augment.color_strength,
            "random_gray_scale": view.gray_prob,
            "gaussian_blur": view.blur_prob,
            "normalize": None,
        },
        blocks=NUM_BLOCKS[encoder.depth],
        width=int(STEM_WIDTH * encoder.width),
        stem="cifar" if encoder.stem == "cifar" else "imagenet",
        hidden_dim=head.hidden_dim or int(8 * STEM_WIDTH * encoder.width),
        out_dim=head.out_dim,
        head_layers=head.num_layers,
        weights=build_method(config.model, config.seed).state_dict(),
        seed=config.seed,
    )


def lightly_training(config: PretrainConfig, num_images: int, cores: int, script: Script) -> Run:
    """Set lightly's script up; it trains on so many images, a multiple of `images_of_epoch`."""
    take_cores(cores)
    torch.set_num_threads(script.threads)
    if script.layout:
        keep_freed_memory()
    torch.manual_seed(config.seed)
    # Torch would rather not have more workers than cores, and says so at every epoch.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    settings = settings_of(config)
    loader: Iterable[list[Tensor]]
    loader = EpochAfterEpoch(our_loader(config, cores)) if script.our_views else data_loader(settings, script.workers)
    batch_size = config.data.global_batch_size
    steps_per_epoch = num_images // batch_size
    training = Training(settings, loader, steps_per_epoch=steps_per_epoch, channels_last=script.layout)
    epochs_left = config.train.epochs

    def run(images: int) -> None:
        nonlocal epochs_left
        for _ in range(images // images_of_epoch(num_images, batch_size)):
            training.epoch()
            epochs_left -= 1
        if script.weights and not epochs_left:
            torch.save(training.model.backbone.state_dict(), script.weights)

    return run


class EpochAfterEpoch:
    """A loader of ours as a script takes one: an epoch further each time it is gone through."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._epoch = loader, -1

    def __iter__(self) -> Iterator[list[Tensor]]:
        self._epoch += 1
        return (batch.views for batch in self._loader.epoch(self._epoch))


def our_loader(config: PretrainConfig, cores: int) -> Loader:
    """The loader of a run on the CPU."""
    return build_loader(
        config.data,
        open_data(config.data),
        build_recipe(config.augment),
        seed=config.seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        num_cores=cores,
    )


def lightly_contestant(name: str, config: PretrainConfig, num_images: int, cores: int, script: Script) -> Contestant:
    """Lightly's script, as `script` runs it."""
    contestant = _contestant(name, lightly_training, config, num_images, (cores, script))
    if script.layout:
        return replace(contestant, held_mib=SCRIPT_MIB + KEPT_MIB)
    return replace(contestant, held_mib=SCRIPT_MIB, work_mib=KEPT_MIB)


def twinview_contestant(name: str, config: PretrainConfig, num_images: int, cores: int) -> Contestant:
    """Ours."""
    contestant = _contestant(name, twinview_training, replace(config, name=name), num_images, (cores,))
    return replace(contestant, held_mib=FOLDER_MIB if config.data.loader == "folder" else OURS_MIB)


def _contestant(
    name: str, setup: Callable[..., Run], config: PretrainConfig, num_images: int, arguments: tuple[Any, ...]
) -> Contestant:
    step = images_of_epoch(num_images, config.data.global_batch_size)
    return Contestant(name=name, setup=setup, arguments=(config, num_images, *arguments), step=step)


def make_digits(folder: Path) -> None:
    """The demo's digits: `train` and `test`, as folders of images and as raw betons beside them."""
    # Processes of their own: benchmarks know the tools by their commands alone.
    subprocess.run([sys.executable, "-c", DIGITS, str(folder)], check=True, cwd=ROOT)
    for split in ("train", "test"):
        convert = ["-m", "tools.convert", str(folder / split), str(folder / f"{split}.beton"), "--encode", "raw"]
        subprocess.run([sys.executable, *convert], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
