"""Pretrain an encoder: `deepspeed train/pretrain.py --config configs/….yaml --data.path ….beton --name …`.

Also under `torchrun`, and plainly under `python`. Everything that the user could have got wrong is checked before a
process group, a model or a folder exists.
"""

import os
import sys
from contextlib import closing
from pathlib import Path

if not __package__:  # started as a file: put the project's root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# Read once, when torch is loaded: its threads soon sleep where they wait for one another. Left to spin, they take the
# cores from the very thread that they wait for, as soon as anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from model.build import build_method
from model.norm import check_group_size, groups_of, set_group
from pipelines.augment import build_recipe
from pipelines.batch import Loader
from pipelines.build import MissingPackage, build_loader, check_batch_size, open_data
from train.cli import UnfitEnvironment, run
from train.config import PretrainConfig, check_micro_batch_size, claim_run_dir, parse_pretrain_config
from train.engine import Engine, init_process_group
from train.loop import Pretraining
from train.optim.lars import LARS
from train.optim.lars_backends import check_backend
from train.optim.param_groups import param_groups
from train.runtime import Ranks, choose_device, configure_logging, cores_per_rank, keep_freed_memory, read_ranks
from train.schedule import num_warmup_steps


def main() -> None:
    """Check, set up, train."""
    config = parse_pretrain_config()
    ranks = read_ranks()
    data = open_data(config.data)
    check_batch_size(config.data.global_batch_size, ranks.world_size, data.num_samples)
    check_micro_batch_size(config, ranks.world_size)
    check_group_size(config.model.norm_group_size, ranks.world_size)
    steps_per_epoch = data.num_samples // config.data.global_batch_size
    total_steps = config.train.epochs * steps_per_epoch
    warmup_steps = num_warmup_steps(config.schedule, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    device = choose_device(config.train.device, ranks)
    check_backend(config.optim.backend, config.optim.form, device)
    num_cores = cores_per_rank(ranks)
    torch.set_num_threads(config.train.cpu_threads or num_cores)
    if device.type == "cpu":
        keep_freed_memory()
    if config.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # torch's default would compute convolutions with 10 bits
    try:
        loader = build_loader(
            config.data,
            data,
            build_recipe(config.augment),
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=device,
            dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
            num_cores=num_cores,
        )
    except MissingPackage as error:
        raise UnfitEnvironment(str(error)) from error
    with closing(loader):
        _train(config, ranks, device, loader, num_warmup_steps=warmup_steps)


def _train(
    config: PretrainConfig, ranks: Ranks, device: torch.device, loader: Loader, *, num_warmup_steps: int
) -> None:
    claim_run_dir(config)
    configure_logging(config.run_dir, ranks)
    init_process_group(device)
    method = build_method(config.model, config.seed)
    set_group(method, groups_of(config.model.norm_group_size))
    optimizer = LARS(
        param_groups(method, config.optim.weight_decay),
        lr=0.0,  # the schedule sets it before each step
        momentum=config.optim.momentum,
        trust_coefficient=config.optim.trust_coefficient,
        form=config.optim.form,
        nesterov=config.optim.nesterov,
        backend=config.optim.backend,
    )
    engine = Engine(
        method,
        optimizer,
        ranks=ranks,
        device=device,
        precision=config.train.precision,
        local_batch_size=config.data.global_batch_size // ranks.world_size,
        micro_batch_size=config.train.micro_batch_size,
        zero_stage=config.train.zero_stage,
        gradient_clipping=config.train.gradient_clipping,
        on_nonfinite=config.train.on_nonfinite,
    )
    pretraining = Pretraining(config, method, engine, loader, ranks, warmup_steps=num_warmup_steps)
    pretraining.restore()
    pretraining.check_ranks_agree()
    pretraining.run()


if __name__ == "__main__":
    run(main)
