"""What a loader's stages take: what the kernel's own clock counts, and what storage gives."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import open_beton
from pipelines.decode.clock import CROP, DECODE, NUM_PARTS, PHOTOMETRIC, THREAD
from pipelines.ffcv_loader import FFCVLoader
from pipelines.folder_loader import FolderLoader
from tests.pipelines.betons import make_beton, natural_image
from tools.profile_folder import folder_times
from tools.profile_loader import LoaderBench, loader_times, run_batches, seconds_alone, touch
from tools.profile_storage import StoredBeton, StoredFiles, read_cold, read_warm

BATCH = 8


def make_loader(beton, **options):
    recipe = build_recipe(AugmentConfig(size=32))
    return FFCVLoader(beton, recipe, seed=1, global_batch_size=BATCH, num_threads=1, **options)


def bench_of(loader, seconds=0.05):
    return LoaderBench(loader=loader, device=torch.device("cpu"), num_threads=1, batches_ahead=2, seconds=seconds)


def rendered(loader, num_batches):
    """The buffers of batches, the seconds of the parts of the kernel, and the CPU seconds of it all."""
    renderer, plan = loader.renderer, loader.plan
    renderer.wait(renderer.start(0, plan.samples(0, 0)))  # compiled, and what is made once
    began, buffers, spent = time.process_time(), [], np.zeros(NUM_PARTS)
    for batch in range(num_batches):
        made = renderer.wait(renderer.start(0, plan.samples(0, batch % len(plan))))
        buffers.append(made.out.clone())
        spent += sum(made.spent, np.zeros(NUM_PARTS)) / 1e9
    return buffers, spent[[DECODE, CROP, PHOTOMETRIC]], time.process_time() - began


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("small"), [(200, 160)] * 16)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("large"), [(400, 320)] * 16)


def test_the_clock_changes_no_pixel_and_counts_all_of_the_time(small):
    loader = make_loader(small)
    plain, nothing, _ = rendered(loader, 4)
    assert not nothing.any()
    loader.renderer.clock = THREAD
    timed, parts, cpu_seconds = rendered(loader, 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, timed, strict=True))
    assert (parts > 0).all()
    assert 0.3 * cpu_seconds < parts.sum() <= cpu_seconds  # the rest is Python's, and the copies of this test
    loader.close()


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_parts_add_up_to_the_loader_itself(tmp_path, encode):
    loader = make_loader(make_beton(tmp_path, [(200, 160)] * 16, encode=encode))
    loader.renderer.clock = THREAD
    _, parts, _ = rendered(loader, 20)
    loader.renderer.clock = None
    batches = run_batches(loader)
    for _ in range(4):
        next(batches)
    began = time.process_time()  # CPU seconds: what else the machine does is not in them
    for _ in range(20):
        next(batches)
    whole = time.process_time() - began
    batches.close()
    loader.close()
    assert 0.4 < parts.sum() / whole < 1.5


def test_four_times_the_pixels_cost_the_decoder_alone(small, large):
    found = []
    for beton in (small, large):
        loader = make_loader(beton)
        loader.renderer.clock = THREAD
        found.append(rendered(loader, 10)[1])
        loader.close()
    decode, _, photometric = found[1] / found[0]
    assert 2.0 < decode < 8.0
    assert 0.5 < photometric < 2.0


def test_crops_are_timed_without_colours(small):
    loader = make_loader(small, output="crops")
    loader.renderer.clock = THREAD
    _, (decode, crop, photometric), _ = rendered(loader, 2)
    assert decode > 0
    assert crop > 0
    assert photometric == 0
    loader.close()


def test_stages_of_a_loader(small):
    loader = make_loader(small)
    bench = bench_of(loader)
    touch(bench, 3)
    times, stored_bytes = loader_times(bench)
    assert list(times) == ["storage_cold", "storage_warm", "decode", "crop", "photometric"]
    assert stored_bytes == np.mean(small.sizes)
    assert all(min(of.seconds) > 0 for of in times.values())
    assert loader.renderer.clock is None
    assert len(seconds_alone(bench)) >= 3
    loader.close()


def test_one_rank_reads_storage_for_its_machine(small):
    loader = make_loader(small)
    options = {"loader": loader, "device": loader.device, "num_threads": 1, "batches_ahead": 1, "seconds": 0.01}
    met = []
    times, _ = loader_times(LoaderBench(local_rank=1, local_world_size=2, meet=lambda: met.append(1), **options))
    assert times["storage_cold"].seconds == [0.0]
    assert met == [1]
    loader.close()


def test_batches_come_in_the_order_of_a_run_and_go_on_with_the_next_epoch(small):
    loader = make_loader(small)
    batches = run_batches(loader)
    seen = [next(batches) for _ in range(2 * len(loader) + 1)]
    assert [batch.epoch for batch in seen] == [0, 0, 1, 1, 2]
    assert np.array_equal(seen[3].sample_indices, loader.plan.samples(1, 1))
    batches.close()
    loader.close()


def test_storage_reads_what_it_says(small):
    stored, rows = StoredBeton(small), np.random.default_rng(0).permutation(16)
    assert np.array_equal(stored.num_bytes(rows), small.sizes[rows])
    cold = read_cold(stored, iter([rows[:10], rows[10:]]), num_threads=2, seconds=60.0)
    assert np.array_equal(cold.rows, rows)
    assert 0.0 <= cold.left <= 1.0
    assert min(cold.seconds_per_image) > 0
    warm = read_warm(stored, rows, num_threads=2, seconds=0.01)
    assert min(warm) > 0


def test_pages_are_dropped_where_they_can_be(small, tmp_path):
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no tmpfs to write to")
    path = shared / f"twinview-{os.getpid()}.beton"
    path.write_bytes(small.path.read_bytes())
    try:
        assert StoredBeton(open_beton(path)).drop(np.arange(16)) == 1.0  # it lies in memory, and nowhere else
    finally:
        path.unlink()
    file = tmp_path / "file"
    file.write_bytes(os.urandom(2**16))
    files = StoredFiles([str(file), str(file)])
    assert files.num_bytes(np.arange(2)).tolist() == [2**16, 2**16]
    assert 0.0 <= files.drop(np.arange(2)) <= 1.0
    files.read(np.arange(2))


def test_processes_of_a_folder(tmp_path):
    for i in range(6):
        natural_image(64, 48, i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    loader = FolderLoader(tmp_path, build_recipe(AugmentConfig(size=16)), seed=1, global_batch_size=4)
    threads = torch.get_num_threads()
    found = folder_times(loader, 2, 0.01)
    assert list(found) == ["decode", "crop"]
    assert all(min(seconds) > 0 and "times 2" in how for seconds, how in found.values())
    assert torch.get_num_threads() == threads
    loader.close()
