"""LARS under DeepSpeed's ZeRO stages 1 and 2: whole tensors in spite of flat partitions, on any number of ranks."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

from model.build import ModelConfig, build_method
from model.collectives import all_gather_rows, all_reduce_sum_
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tests.distributed.ranks import run_ranks
from tests.train.slopes import (
    FORMS,
    MOMENTUM,
    TRUST,
    WEIGHT_DECAY,
    LARSFormula,
    Slopes,
    copy_of,
    distance,
    make_engine,
    mean_slopes,
    motion,
    take_steps,
)
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.cli import UnfitEnvironment
from train.optim.lars import LARS
from train.optim.param_groups import param_groups
from train.optim.zero import flat_groups

pytestmark = pytest.mark.distributed

STAGES = (0, 1, 2)
WRITERS = {4: 2, 1: 0, 2: 1}
"""World sizes that write a checkpoint, in the order in which they run, and the stage at which they do."""
WORLD_SIZES = (*WRITERS, 3)
BEFORE, AFTER = range(3), range(3, 6)
"""The steps before a checkpoint and after it."""
GLOBAL_BATCH_SIZE = 12
SIMCLR = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    temperature=0.5,
)
SIMCLR_STEPS, SIMCLR_LR = 3, 1.0


def lars(method, form="classic", nesterov=False):
    return LARS(
        param_groups(method, WEIGHT_DECAY),
        momentum=MOMENTUM,
        trust_coefficient=TRUST,
        form=form,
        nesterov=nesterov,
        backend="auto" if dist.get_world_size() == 3 else "reference",
    )


def built(stage, form=FORMS[0], seed=0):
    method = Slopes(seed)
    optimizer = lars(method, *form)
    return method, optimizer, make_engine(method, optimizer, zero_stage=stage)


def found_in(method, engine):
    """Copies of parameters and momentum by name."""
    momentum = {name: slots["momentum"] for name, slots in engine.optimizer_state().items()}
    return copy_of(dict(method.named_parameters())), copy_of(momentum)


def formula_after(steps, form=FORMS[0]):
    formula = LARSFormula(Slopes(), *form)
    for step in steps:
        formula.step(mean_slopes(step, dist.get_world_size()))
    return formula


def assert_follows(found, formula):
    """To what float32 rounds in a handful of steps, tensor by tensor."""
    parameters, momentum = found
    assert distance(motion(parameters, Slopes()), motion(formula.parameters, Slopes())) < 1e-6
    assert distance(momentum, formula.momentum) < 1e-6


def assert_equal(found, expected):
    for tensors, others in zip(found, expected, strict=True):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def check_whole_tensors_take_the_steps_of_the_formula(stage, form):
    runs = []
    for _ in range(2):
        method, _, engine = built(stage, form)
        take_steps(engine, BEFORE)
        runs.append(found_in(method, engine))
        assert_follows(runs[-1], formula_after(BEFORE, form))
    assert_equal(*runs)
    for tensor in [tensor for tensors in runs[0] for tensor in tensors.values()]:
        assert (all_gather_rows(tensor.flatten()[None]) == tensor.flatten()).all(), "alike on all ranks"


def check_lars_that_takes_partitions_for_tensors_is_far_off(stage):
    """Else the check above would prove nothing."""
    method, optimizer, engine = built(stage)
    optimizer._partition = None
    take_steps(engine, BEFORE)
    parameters, _ = found_in(method, engine)
    assert distance(motion(parameters, Slopes()), motion(formula_after(BEFORE).parameters, Slopes())) > 0.1


def check_partitions(stage):
    """Every element has an owner. On 4 ranks, borders cut the convolution twice, and a partition is all padding."""
    _, optimizer, engine = built(stage)
    take_steps(engine, [0])
    world_size = dist.get_world_size()
    for group, name in zip(engine._flat_groups, ("conv.weight", "linear.bias"), strict=True):
        spans = [group.overlap(place) for place in group.places.values()]
        sizes = [place.param.numel() for place in group.places.values()]
        assert all_reduce_sum_(torch.tensor([end - first for first, end in spans])).tolist() == sizes
        momentum = optimizer.state[group.partition]["momentum"]
        assert momentum.numel() == 2 * math.ceil(sum(sizes) / (2 * world_size)), "no more than this rank's share"
        if world_size == 4:
            first, end = group.overlap(group.places[name])
            assert end - first == {"conv.weight": [9, 44, 43, 0], "linear.bias": [2, 2, 1, 0]}[name][dist.get_rank()]


def check_tables_of_another_deepspeed_are_refused(stage):
    """Of one that starts its flat tensors with something else, and of one that calls a table something else."""
    _, _, engine = built(stage)
    other = copy.copy(engine._deepspeed_optimizer)
    other.round_robin_bit16_offsets = [[offset + 1 for offset in group] for group in other.round_robin_bit16_offsets]
    with pytest.raises(UnfitEnvironment, match=r"do not hold `.*` where .* 0\.19\.8; .* set `train\.zero_stage` to 0"):
        flat_groups(other)
    del other.partition_size
    with pytest.raises(UnfitEnvironment, match=r"keep no `partition_size`, .* set `train\.zero_stage` to 0"):
        flat_groups(other)


def check_a_foreign_state_is_refused(stage):
    method, _, engine = built(stage)
    take_steps(engine, [0])
    before = found_in(method, engine)
    with pytest.raises(ValueError, match=r"^optimizer state `conv\.bias` belongs to no parameter here; resume with"):
        engine.load_optimizer_state({"conv.bias": {}})
    with pytest.raises(ValueError, match=r"`conv\.weight\.momentum` must have shape \[6, 4, 2, 2\], got \[96\]; "):
        engine.load_optimizer_state({"conv.weight": {"momentum": torch.zeros(96)}})
    assert_equal(found_in(method, engine), before)


def write_checkpoint(folder, stage):
    """Write one after the steps `BEFORE`; what the same run has come to after those that follow."""
    method, _, engine = built(stage)
    take_steps(engine, BEFORE)
    checkpoint = Checkpoint(model=method.state_dict(), optimizer=engine.optimizer_state())  # on all ranks
    if dist.get_rank() == 0:
        save_checkpoint(folder / f"{dist.get_world_size()}.safetensors", checkpoint)
    dist.barrier()
    take_steps(engine, AFTER)
    return found_in(method, engine)


def check_a_checkpoint_goes_on(path, stage):
    """Into an engine that has other weights and a momentum already; what it has come to."""
    checkpoint = load_checkpoint(path)
    method, _, engine = built(stage, seed=9)
    take_steps(engine, [77])
    engine.load_parameters(checkpoint.model)
    engine.load_optimizer_state(checkpoint.optimizer)
    take_steps(engine, AFTER)
    found = found_in(method, engine)
    assert_follows(found, formula_after([*BEFORE, *AFTER]))
    return found


def small_simclr():
    """With every γ away from the 0 that would close the blocks."""
    method = build_method(SIMCLR, seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return method


def simclr_views(own=slice(None)):
    generator = torch.Generator().manual_seed(5)
    image, *noise = torch.randn(3, GLOBAL_BATCH_SIZE, 3, 16, 16, generator=generator)
    return [(image + 0.5 * n)[own].contiguous(memory_format=torch.channels_last) for n in noise]


def simclr_in_one_process():
    """Losses and parameters: no DeepSpeed, gradients of the whole batch, LARS in float64."""
    method = small_simclr()
    formula = LARSFormula(method)
    losses = []
    for _ in range(SIMCLR_STEPS):
        loss, _ = method(simclr_views())
        method.zero_grad()
        loss.backward()
        losses.append(loss.item())
        formula.step({name: parameter.grad for name, parameter in method.named_parameters()}, lr=SIMCLR_LR)
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                parameter.copy_(formula.parameters[name])
    return losses, formula.parameters


def check_simclr_learns_what_one_process_does(stage, expected_losses, expected):
    """A network and batches in channels_last; through the batch norm and the negatives of all ranks, in float32."""
    num_images = GLOBAL_BATCH_SIZE // dist.get_world_size()
    views = simclr_views(slice(dist.get_rank() * num_images, (dist.get_rank() + 1) * num_images))
    method = small_simclr().to(memory_format=torch.channels_last)
    engine = make_engine(method, lars(method), zero_stage=stage, local_batch_size=num_images)
    losses = []
    for step in range(SIMCLR_STEPS):
        loss, _ = engine.train_step(views, lr=SIMCLR_LR, step=step + 1)
        losses.append(engine.mean_over_ranks({"loss": loss})["loss"])
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    parameters, _ = found_in(method, engine)
    assert distance(motion(parameters, small_simclr()), motion(expected, small_simclr())) < 1e-3


def check_everything(rank, folder, simclr_expected):
    world_size = dist.get_world_size()
    for stage in STAGES:
        for form in FORMS if world_size == 3 else FORMS[:1]:
            check_whole_tensors_take_the_steps_of_the_formula(stage, form)
        check_a_foreign_state_is_refused(stage)
        check_simclr_learns_what_one_process_does(stage, *simclr_expected)
    for stage in (1, 2):
        check_lars_that_takes_partitions_for_tensors_is_far_off(stage)
        check_partitions(stage)
        check_tables_of_another_deepspeed_are_refused(stage)
    if world_size in WRITERS:
        uninterrupted = write_checkpoint(folder, WRITERS[world_size])
    for path in sorted(folder.glob("*.safetensors")):
        for stage in STAGES:
            continued = check_a_checkpoint_goes_on(path, stage)
            if WRITERS[int(path.stem)] == stage and int(path.stem) == world_size:
                assert_equal(continued, uninterrupted)


def test_lars_is_exact_at_every_stage_and_its_checkpoints_go_on_at_any(tmp_path):
    """On 4 ranks, then on 1, 2 and 3, each of which goes on with what those before have written."""
    simclr_expected = simclr_in_one_process()
    for world_size in WORLD_SIZES:
        run_ranks(check_everything, world_size, tmp_path, simclr_expected)
