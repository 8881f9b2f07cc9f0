"""What the tests of the GPU kernels feed them, in the interpreter and on a GPU."""

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.params import NO_OP, VIEW_PARAMS

ALL_ORDERS = np.array(list(itertools.permutations(range(4))))
FACTORS = np.array([1.4, 0.6, 1.7, -0.15])
COLOURS = {"jitter_prob": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "gray_prob": 0.2}
STUDY = {"rotate_prob": 0.5, "sobel_prob": 0.4, "noise_prob": 0.5, "cutout_prob": 0.5}
EVERYTHING = COLOURS | STUDY | {"blur_prob": 0.5, "solarize_prob": 0.4}


def random_crops(num, size, seed=0):
    """Random pixels; every fourth image is gray, the next one flat, the next one striped with black."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    crops[1::4] = crops[1::4, :1].clone()
    crops[2::4] = torch.tensor([255, 0, 128], dtype=torch.uint8)[:, None, None]
    crops[3::4, :, ::2] = 0
    return crops


def unaligned(crops):
    """The same crops in channels_last memory that begins at an odd address."""
    pixels = crops.permute(0, 2, 3, 1)
    memory = torch.cat([pixels.new_zeros(1), pixels.reshape(-1)])
    return memory[1:].view(pixels.shape).permute(0, 3, 1, 2)


def real_crops(num, size):
    """Central squares of photographs, resized."""
    crops = []
    with tarfile.open(Path(os.environ["TWINVIEW_DATA"], "imagenet-sample.tar")) as tar:
        for member in itertools.islice((m for m in tar if m.name.endswith(".JPEG")), num):
            with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                crops.append(np.array(image.convert("RGB").resize((size, size))))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def view_params(num, **fields):
    """Parameters that ask for nothing but `fields`."""
    params = np.zeros(num, VIEW_PARAMS)
    params["jitter_order"], params["jitter_factor"] = NO_OP, (1.0, 1.0, 1.0, 0.0)
    params["solarize_threshold"] = np.inf
    for name, value in fields.items():
        params[name] = value
    return params


def packed(sizes, seed=0):
    """Images of (width, height) as pixels, offsets, widths, heights; there is a gap before each."""
    rng = np.random.default_rng(seed)
    blocks, offsets, end = [], [], 0
    for width, height in sizes:
        gap = int(rng.integers(1, 8))
        blocks.append(rng.integers(0, 256, gap + width * height * 3, dtype=np.uint8))
        offsets.append(end + gap)
        end += len(blocks[-1])
    widths, heights = np.array(sizes, np.int32).T
    return tuple(
        torch.from_numpy(array.copy()) for array in (np.concatenate(blocks), np.array(offsets), widths, heights)
    )
