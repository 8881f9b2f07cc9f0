"""Host buffers: used again when nobody holds them, never before; loaders' memory stays flat (DALI's: its own tests)."""

import gc

import numpy as np
import psutil
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.buffers import HostBuffers
from pipelines.build import DataConfig, build_loader, open_data
from tests.pipelines.betons import make_beton


def test_a_buffer_is_used_again_once_nobody_holds_a_tensor_of_it():
    buffers = HostBuffers(np.float32, pinned=False)
    first = buffers.take(1000)
    address = first.data_ptr()
    view = first[10:20].reshape(2, 5).permute(1, 0)
    del first
    assert buffers.take(1000).data_ptr() != address  # the view lives
    del view
    assert buffers.take(800).data_ptr() == address


def test_tensors_in_use_never_overlap():
    buffers = HostBuffers(np.uint8, pinned=False)
    held = [buffers.take(size) for size in (10, 5, 10, 7, 12)]
    for i, tensor in enumerate(held):
        tensor.fill_(i)
    assert [tensor.unique().tolist() for tensor in held] == [[0], [1], [2], [3], [4]]
    assert [tensor.numel() for tensor in held] == [10, 5, 10, 7, 12]


def test_buffers_that_are_too_small_are_given_back():
    buffers = HostBuffers(np.uint8, pinned=False)
    for size in range(1, 200):
        buffers.take(size)
    assert len(buffers._arrays) == 1


@pytest.mark.parametrize("loader", ["ffcv", "resident", "folder"])
def test_memory_stays_flat_over_50_epochs(tmp_path, loader):
    sizes = [(60 + 40 * (i % 5), 90 + 30 * (i % 3)) for i in range(32)]
    beton = make_beton(tmp_path, sizes)
    path = tmp_path / "images" if loader == "folder" else beton.path
    config = DataConfig(path=str(path), loader=loader, global_batch_size=8, num_threads=2 if loader == "ffcv" else 0)
    recipe = build_recipe(AugmentConfig(size=64))
    ranks = {"seed": 0, "rank": 0, "world_size": 1, "num_cores": 0 if loader == "folder" else 1}
    made = build_loader(config, open_data(config), recipe, device=torch.device("cpu"), dtype=torch.float32, **ranks)
    process, held = psutil.Process(), []
    try:
        for epoch in range(50):
            for batch in made.epoch(epoch):
                assert batch.num_images == 8
            next(made.epoch(epoch))  # and one that is left early
            gc.collect()
            held.append(process.memory_info().rss)
    finally:
        made.close()
    # A batch takes 0.8 MB: one that leaked in an epoch would show as 35 MB.
    assert held[-1] - held[5] < 8e6, np.diff(held)
