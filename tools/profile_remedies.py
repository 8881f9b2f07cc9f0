"""What can be changed on the loading side, and what the model expects of it.

Each rule looks at a case and gives advice where it applies; `tools.profile_advice` keeps what gains enough. Factors are
of measured ratios, named beside them; they decide what is tried first, and measuring decides what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tools.profile_case import Advice, Case
from tools.profile_model import Costs

FOLDER_FACTOR = 1 / 3  # decode and crop of one thread against Pillow's and torchvision's: docs/results, `crop224`
DALI_FACTOR = 1 / 4  # likewise against DALI's on the CPU
TORCH_CROP_FACTOR = 1 / 15  # the loader's kernel against torch's crops on the CPU: 500 pixels to two views of 96
SCALED_FACTOR = 0.6  # decoding at half or quarter scale, images three times as large as the view: `scaled` there
RAW_FACTOR = 0.05  # pixels are copied: a thousandth of a millisecond where a JPEG of 32² pixels takes four
DECODE_FLOOR = 0.07  # of a JPEG's decoding, what does not go down with its pixels; 500 to 256 pixels: 3.1 times as fast
QUALITY_75_FACTOR = 0.78  # 500 pixels at quality 75 against 90
ENLARGED = 1.14  # stored sides stay this much above the view's, 256 for 224, so that crops need not be enlarged more
TINY_SIDE = 96  # up to which raw pixels are worth their room
DISK_BYTES_PER_SEC = 2e9  # that a local NVMe disk reads at random in parts of an image's size
DEVICE_BYTES_PER_SEC = 3e11  # memory of the slowest GPU that trains (T4); crops are cut at about that
SIDES = (500, 400, 320, 256, 192, 160, 128, 96, 72, 64, 48, 40, 32)
CONVERT = "python -m tools.convert"


def threads(case: Case) -> Iterator[Advice]:
    """How many threads decode, and how many compute."""
    profile, costs = case.profile, case.costs
    cores, now = profile.num_cores, (profile.num_threads, profile.cpu_threads)
    if costs.in_turn:
        return
    if case.on_gpu:
        if profile.num_threads < cores:
            why = f"{now[0]} of {cores} cores decode: at most {1 / costs.loading:,.0f} images/s"
            yield case.advice({"data.num_threads": cores}, why, costs.with_threads(num_threads=cores))
        return
    splits = {(n, cores - n) for n in range(1, cores)} | {(cores, cores), (cores, now[1]), (now[0], cores)} - {now}
    best = max(sorted(splits - {now}), key=lambda split: case.expected(_with(costs, split)), default=None)
    if best is None:
        return
    change = {
        name: new
        for name, new, old in zip(("data.num_threads", "train.cpu_threads"), best, now, strict=True)
        if new != old
    }
    decoding, computing = 1 / costs.loading, 1 / costs.training
    if costs.crowded and sum(best) <= cores:
        why = (
            f"{_threads(now[0])} to decode and {now[1]} to compute share {cores} cores and reach {case.held:.0%} of "
            f"what their work adds up to; {best[0]} and {best[1]} have cores of their own"
        )
    else:
        why = (
            f"{_threads(now[0])} to decode: at most {decoding:,.0f} images/s; {_threads(now[1])} to compute: at most "
            f"{computing:,.0f}; there are {cores} cores"
        )
    yield case.advice(change, why, _with(costs, best))


def loaders(case: Case) -> Iterator[Advice]:
    """Another loader."""
    profile, around, costs = case.profile, case.around, case.costs
    other = "pixels differ by a rounding, so a run keeps the loader that it began with"
    if profile.loader == "folder":
        path = str(case.option("data.path"))
        dest = f"data/{Path(path).name}.beton"
        yield Advice(
            change={"data.loader": "ffcv", "data.path": dest},
            why="Pillow and torchvision in processes take about three times as long as one decode in threads",
            expected_images_per_sec=case.expected(costs.scaled(decode=FOLDER_FACTOR, crop=FOLDER_FACTOR)),
            kind="convert",
            effect=other,
            command=f"{CONVERT} {path} {dest}",
        )
    if profile.loader == "dali" and not case.on_gpu:
        cheaper = costs.scaled(decode=DALI_FACTOR, crop=DALI_FACTOR)
        yield case.advice({"data.loader": "ffcv"}, "on a CPU, DALI takes about four times as long", cheaper, other)
    if not case.on_gpu:
        yield from _resident_on_cpu(case, other)
        return
    if profile.loader not in ("ffcv", "dali"):
        return
    if 0 < case.decoded_set <= around.device_free / 2:
        why = (
            f"the set is {case.decoded_set / 1e9:.1f} GB of pixels and lies on the GPU then; nothing is loaded any more"
        )
        moved = replace(costs, host={}, reading=0.0, copying=0.0)
        yield case.advice({"data.loader": "resident"}, why, moved, other)
    if profile.loader == "ffcv" and around.has_dali and around.stored in ("jpeg", "raw") and "decode" in costs.host:
        why = "decoding moves to the GPU, beside the model; how fast its decoder is, only measuring tells: at most this"
        yield case.advice({"data.loader": "dali"}, why, replace(costs, host={}), other)


def _resident_on_cpu(case: Case, other: str) -> Iterator[Advice]:
    """Torch's crops, which the thread that trains makes, against decoding in each epoch."""
    costs, stored = case.costs, case.around.stored
    if case.profile.loader == "resident" and stored == "raw":  # else what decoding would take is not known
        why = "on a CPU, `resident` cuts its crops with torch, in the thread that trains, while nothing is computed"
        yield case.advice(
            {"data.loader": "ffcv"}, why, replace(costs.scaled(crop=TORCH_CROP_FACTOR), in_turn=False), other
        )
    if case.profile.loader == "ffcv" and stored != "raw" and 0 < case.decoded_set <= case.around.free_memory / 2:
        why = (
            f"the set is {case.decoded_set / 1e9:.1f} GB of pixels and fits into memory: decoded once, cropped by torch"
        )
        slower = costs.scaled(decode=0.0, crop=1 / TORCH_CROP_FACTOR).with_threads(num_threads=costs.cpu_threads)
        yield case.advice({"data.loader": "resident"}, why, replace(slower, reading=0.0, in_turn=True), other)


def geometry(case: Case) -> Iterator[Advice]:
    """Where crops are cut."""
    profile, costs = case.profile, case.costs
    if profile.loader != "ffcv":
        return
    chosen = case.option("data.geometry")
    if not case.on_gpu:
        if chosen == "device":
            why = "on a CPU torch cuts the crops then, in the training thread; the decoding threads do it faster"
            yield case.advice({"data.geometry": "auto"}, why, costs.scaled(crop=TORCH_CROP_FACTOR))
        return
    if "crop" not in costs.host or case.decoded_bytes == 0:
        return
    larger = case.decoded_bytes / max(profile.bytes_per_image_to_device, 1.0)
    moved = costs.scaled(crop=0.0, host_to_device=larger)
    moved = replace(moved, device=moved.device | {"crop": 2 * case.decoded_bytes / DEVICE_BYTES_PER_SEC})
    why = (
        f"the GPU cuts the crops then, and the threads only decode; {larger:.1f} times as many bytes travel to it, for "
        f"which there is room up to {1 / max(moved.copying, 1e-12):,.0f} images/s"
    )
    yield case.advice({"data.geometry": "device"}, why, moved, "crops differ by at most a level of 255")


def less_decoding(case: Case) -> Iterator[Advice]:
    """JPEGs at half or quarter scale."""
    profile, stored = case.profile, case.around.longest_side
    decoded = profile.loader == "ffcv" and "decode" in case.costs.host and not case.option("data.scaled_decode")
    if decoded and stored >= 2.5 * profile.image_side:
        why = (
            f"stored images have {stored} pixels a side, views {profile.image_side}: most can be decoded at half or a "
            "quarter of their size"
        )
        change, cheaper = {"data.scaled_decode": True}, case.costs.scaled(decode=SCALED_FACTOR)
        yield case.advice(change, why, cheaper, "crops differ by about a level of 255 in the mean")


def prefetching(case: Case) -> Iterator[Advice]:
    """More batches in the making, where the step waits although loading is fast enough."""
    profile, costs = case.profile, case.costs
    if profile.data_wait > 0.03 and costs.loading < 0.8 * costs.training and not costs.crowded and not costs.in_turn:
        ahead = 2 * int(case.option("data.batches_ahead"))
        yield Advice(
            change={"data.batches_ahead": ahead},
            why=f"loading is the faster side, yet the step waits {profile.data_wait:.0%} of the time: uneven batches",
            expected_images_per_sec=min(case.now / (1.0 - profile.data_wait), costs.images_per_sec),
            kind="options",
        )


def encoding(case: Case) -> Iterator[Advice]:
    """The images stored otherwise."""
    around, side = case.around, case.profile.image_side
    if around.stored not in ("jpeg", "mixed") or around.longest_side == 0 or case.profile.loader == "folder":
        return
    least = ENLARGED * side
    smaller = [max_side for max_side in SIDES if least <= max_side < 0.95 * around.longest_side]
    for max_side in dict.fromkeys([*smaller[:1], *smaller[-1:]]):
        share = (max_side / around.longest_side) ** 2
        cheaper = case.costs.scaled(decode=DECODE_FLOOR + (1 - DECODE_FLOOR) * share, storage_cold=share)
        why = (
            f"stored images have {around.longest_side} pixels a side, views {side}; at {max_side} there are "
            f"{share:.0%} of the pixels to decode"
        )
        yield _convert(case, {"max_side": max_side}, why, cheaper)
    if not smaller:
        cheaper = case.costs.scaled(decode=QUALITY_75_FACTOR, storage_cold=QUALITY_75_FACTOR)
        yield _convert(case, {"quality": 75}, "at quality 75 there is a fifth less to decode", cheaper)
    if around.longest_side <= TINY_SIDE and case.decoded_set <= around.free_memory / 2:
        why = f"raw pixels need no decoding, and the whole set takes {case.decoded_set / 1e9:.2f} GB"
        yield _convert(case, {"encode": "raw"}, why, replace(case.costs.scaled(decode=RAW_FACTOR), reading=0.0))


def storage(case: Case) -> Iterator[Advice]:
    """What the set is read from, where memory does not hold it."""
    around, costs = case.around, case.costs
    if costs.reading <= 0.0:
        return
    missing = f"the set has {around.set_bytes / 1e9:.1f} GB and {around.free_memory / 1e9:.1f} GB of memory are free"
    yield Advice(
        change={"machine.free memory": f"{1.1 * around.set_bytes / 1e9:.1f} GB"},
        why=f"{missing}: the rest is read anew in each epoch; with so much memory, in the first alone",
        expected_images_per_sec=case.expected(replace(costs, reading=0.0)),
        kind="machine",
    )
    read = (1.0 - around.cached) * case.profile.bytes_per_image_stored / DISK_BYTES_PER_SEC
    yield Advice(
        change={"machine.storage": "a local NVMe disk"},
        why=f"{missing}; a local disk reads about {DISK_BYTES_PER_SEC / 1e9:.0f} GB/s: copy the file there",
        expected_images_per_sec=case.expected(replace(costs, reading=min(costs.reading, read))),
        kind="machine",
        command=f"cp {case.option('data.path')} /a/local/disk/",
    )


def _threads(num: int) -> str:
    return "one thread" if num == 1 else f"{num} threads"


def _with(costs: Costs, split: tuple[int, int]) -> Costs:
    return costs.with_threads(num_threads=split[0], cpu_threads=split[1])


def _convert(case: Case, change: dict[str, int | str], why: str, costs: Costs) -> Advice:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
    path = Path(str(case.option("data.path")))
    dest = path.with_name(f"{path.name.split('.')[0]}-{'-'.join(map(str, change.values()))}.beton")
    return Advice(
        change={f"convert.{name}": value for name, value in change.items()},
        why=why,
        expected_images_per_sec=case.expected(costs),
        kind="convert",
        effect="another set, of smaller or coarser images, for a new run" if "encode" not in change else "",
        command=f"{CONVERT} IMAGES {dest} {options}",
    )
