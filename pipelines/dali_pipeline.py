"""The DALI graph: one decode an image, V views out of it, each with parameters that we drew.

DALI draws nothing. A batch goes in as the encoded images and, for each view, arrays of its samples' parameters; DALI's
random operators are not used, so a batch comes out the same wherever an epoch starts.

A window is cut before it is resized (`fn.slice`, then `fn.resize`): resizing a region of the whole image
(`roi_start`, `roi_end` in pixels) lets pixels outside the window bleed in over the filter's support, by up to 7 levels
on smooth images, and saves a tenth of the time. The flip is the resize's: a region whose begin and end are exchanged.

DALI's own colours (`photometric="dali"`) take the factors that were drawn for ours, in DALI's fixed order, and round to
8 bits after each operator:

- `color_twist`: hue (a rotation of YIQ's chroma plane, which keeps luma where ours keeps HSV's value), saturation
  (0 for gray), contrast (about 128, where ours is about the image's mean gray), brightness; one linear map, clipped
  once, where ours goes in a drawn order and clips after each.
- `gaussian_blur`: ours, but for the kernel's ends beyond 3σ.
- solarize in DALI's arithmetic, and `crop_mirror_normalize`: ours.

Brightness, saturation, gray and blur by themselves are within 1.2 levels of 255 of ours. Whole SimCLR views (s = 1) of
photographs differ by about 10 levels in the mean.

Legend: N images, V views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.batch import MissingPackage
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, VIEW_PARAMS, ViewParams
from pipelines.recipe import Recipe, ViewRecipe

Photometric = Literal["ours", "dali"]
Inputs = list[Any]  # encoded images (a list of N arrays), then the arrays of `view_inputs`, view by view

HW_DECODER_LOAD = 0.65  # share of the images for the JPEG engine of GPUs that have one: DALI's default
IDENTITY_SIGMA = 0.01  # DALI refuses 0; with a window of one pixel any value leaves the image alone
NO_THRESHOLD = 256.0  # above every 8-bit value
BLUR_REACH = 3.0  # DALI's own window ends at this many σ
COLOR_TWIST = ("brightness", "contrast", "saturation", "hue")
CANNOT = ("rotate_prob", "sobel_prob", "noise_prob", "cutout_prob")


def import_dali() -> Any:
    """The module `nvidia.dali`.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise MissingPackage(
            f"`data.loader: dali` needs DALI, which cannot be imported ({error}); install the package "
            "`nvidia-dali-cuda130`, or set `data.loader` to `ffcv`"
        ) from error
    return nvidia.dali


def check_recipe(recipe: Recipe) -> None:
    """Refuse what DALI's own operators cannot do.

    Raises:
        ValueError: naming the field.
    """
    for v, view in enumerate(recipe.views):
        for name in CANNOT:
            if getattr(view, name) > 0.0:
                raise ValueError(
                    f"`data.photometric: dali` has nothing for `{name}`, which is {getattr(view, name)} in view "
                    f"{v + 1}; set `data.photometric` to `ours`"
                )


def view_inputs(params: ViewParams, view: ViewRecipe, photometric: Photometric) -> dict[str, NDArray[Any]]:
    """What DALI's operators take as arguments for one view, by our name of it.

    Args:
        params: `VIEW_PARAMS` [N].
        view: its recipe.
        photometric: whose colours.

    Returns:
        float32 or int32 arrays, [N] or [N, 2] (y, x), contiguous. Which there are depends on `view` alone.
    """
    zeros, ones, flip = np.zeros(len(params)), np.ones(len(params)), params["flip"]
    inputs = {
        "start": np.stack([params["top"], params["left"]], 1).astype(np.int32),
        "shape": np.stack([params["height"], params["width"]], 1).astype(np.int32),
        "roi_start": np.stack([zeros, flip], 1).astype(np.float32),
        "roi_end": np.stack([ones, ~flip], 1).astype(np.float32),
    }
    return inputs | (_color_inputs(params, view) if photometric == "dali" else {})


def _color_inputs(params: ViewParams, view: ViewRecipe) -> dict[str, NDArray[Any]]:
    inputs: dict[str, NDArray[Any]] = {}
    if view.jitter_prob > 0.0 or view.gray_prob > 0.0:

        def factor(op: int, none: float) -> NDArray[np.float32]:
            applied = (params["jitter_order"] == op).any(axis=1)
            return np.where(applied, params["jitter_factor"][:, op], none).astype(np.float32)

        inputs["brightness"], inputs["contrast"] = factor(BRIGHTNESS, 1.0), factor(CONTRAST, 1.0)
        inputs["saturation"] = np.where(params["gray"], np.float32(0.0), factor(SATURATION, 1.0))
        inputs["hue"] = 360 * factor(HUE, 0.0)
    if view.blur_prob > 0.0 and view.blur_kernel > 1:
        sigma = params["blur_sigma"]
        window = np.minimum(2 * np.ceil(BLUR_REACH * sigma) + 1, view.blur_kernel)
        inputs["sigma"] = np.where(sigma > 0.0, sigma, np.float32(IDENTITY_SIGMA))
        inputs["window"] = np.where(sigma > 0.0, window, 1).astype(np.int32)
    if view.solarize_prob > 0.0:
        inputs["threshold"] = np.minimum(255 * params["solarize_threshold"], np.float32(NO_THRESHOLD))
    return inputs


class _Supply:
    """What DALI calls for the next batch; apart from the pipeline's owner, so that dropping that one frees it."""

    def __init__(self) -> None:
        self.batches: Iterator[Inputs] = iter(())

    def __call__(self) -> Inputs:
        return next(self.batches)


class ViewPipeline:
    """A built DALI pipeline, fed from an iterator of batches, that works ahead of whoever takes its outputs.

    Its threads end and its memory is freed when the object is dropped.

    Args:
        recipe: of the views.
        raw: samples are pixels, uint8 [H, W, 3]; else JPEG bytes.
        batch_size: the most images a batch can have.
        num_threads: DALI's.
        device: where views are made: on a CUDA device JPEGs are decoded by nvJPEG.
        queue_depth: batches in the making.
        photometric: `ours`: views are uint8 crops; `dali`: finished float32 views.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        raw: bool,
        batch_size: int,
        num_threads: int,
        device: torch.device,
        queue_depth: int,
        photometric: Photometric,
    ) -> None:
        dali = import_dali()
        self._supply, self._device = _Supply(), device
        self._pipeline: Any = dali.Pipeline(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=_device_id(device),
            prefetch_queue_depth=queue_depth,
        )
        with self._pipeline:
            views = _graph(dali, recipe, self._supply, raw=raw, on_gpu=device.type == "cuda", photometric=photometric)
            self._pipeline.set_outputs(*views)
        self._pipeline.build()

    def begin(self, batches: Iterator[Inputs]) -> None:
        """Take batches from here from now on; the earlier ones must have come to their end."""
        self._supply.batches = batches
        self._pipeline.reset()

    def run(self) -> list[Tensor]:
        """The views of the next batch, V tensors [N, 3, S, S], channels_last, on the device.

        On a GPU the work may not have ended: it is ordered before what the current stream does next. The memory is
        DALI's, and goes back to it with the tensors: they must live until the stream has read them.

        Raises:
            StopIteration: there are no more batches.
            RuntimeError: DALI's, if it cannot decode one of the images; later batches come out all the same.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        outputs = self._pipeline.run(stream)
        return [from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    def close(self) -> None:
        """Wait for the batches in the making, stop the threads and free their memory; what came out stays."""
        self._supply.batches = iter(())
        self._pipeline = None


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _graph(
    dali: Any, recipe: Recipe, supply: Callable[[], Inputs], *, raw: bool, on_gpu: bool, photometric: Photometric
) -> list[Any]:
    """The nodes of the views."""
    fn, types = dali.fn, dali.types
    dali_types = {np.dtype(np.int32): types.INT32, np.dtype(np.float32): types.FLOAT}
    examples = [view_inputs(np.zeros(0, VIEW_PARAMS), view, photometric) for view in recipe.views]
    arrays = [array for example in examples for array in example.values()]
    encoded, *nodes = fn.external_source(
        source=supply,
        num_outputs=1 + len(arrays),
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, *(dali_types[array.dtype] for array in arrays)],
        ndim=[3 if raw else 1, *(array.ndim - 1 for array in arrays)],
        layout=["HWC" if raw else ""],
    )
    remaining = iter(nodes)
    arguments = [{name: next(remaining) for name in example} for example in examples]
    if raw:
        image = encoded.gpu() if on_gpu else encoded
    else:
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            adjust_orientation=False,  # the windows are of the image as it is stored
            jpeg_fancy_upsampling=True,  # as libjpeg-turbo does
            hw_decoder_load=HW_DECODER_LOAD,
        )
    views = [_crop(dali, image, view, inputs) for view, inputs in zip(recipe.views, arguments, strict=True)]
    if photometric == "ours":
        return views
    return [_color(dali, view, recipe, inputs) for view, inputs in zip(views, arguments, strict=True)]


def _crop(dali: Any, image: Any, view: ViewRecipe, inputs: dict[str, Any]) -> Any:
    fn, types = dali.fn, dali.types
    window = fn.slice(image, start=inputs["start"], shape=inputs["shape"], axes=[0, 1])
    return fn.resize(
        window,
        size=[view.size, view.size],
        roi_start=inputs["roi_start"],
        roi_end=inputs["roi_end"],
        roi_relative=True,
        interp_type=types.INTERP_CUBIC if view.interpolation == "bicubic" else types.INTERP_LINEAR,
        antialias=True,
    )


def _color(dali: Any, image: Any, recipe: Recipe, inputs: dict[str, Any]) -> Any:
    fn, types = dali.fn, dali.types
    if "hue" in inputs:
        image = fn.color_twist(
            image, **{name: inputs[name] for name in ("brightness", "contrast", "saturation", "hue")}
        )
    if "sigma" in inputs:
        image = fn.gaussian_blur(image, sigma=inputs["sigma"], window_size=inputs["window"])
    if "threshold" in inputs:
        threshold = inputs["threshold"].gpu() if image.device == "gpu" else inputs["threshold"]
        bright = image >= threshold
        image = fn.cast(bright * (255 - image) + (1 - bright) * image, dtype=types.UINT8)
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * value for value in recipe.mean],
        std=[255 * value for value in recipe.std],
    )
