"""Batches as DALI takes them: samples checked or replaced, parameters drawn, bytes and arguments in arrays.

Legend: N local images, V views.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples import BadSamples
from pipelines.beton import MODE_RAW, Beton
from pipelines.dali_check import JpegCheck
from pipelines.dali_pipeline import Inputs, Photometric, view_inputs
from pipelines.draw import draw_views
from pipelines.params import ViewParams
from pipelines.plan import BatchPlan
from pipelines.recipe import Recipe


@dataclass
class Planned:
    """A batch whose samples are being checked."""

    samples: NDArray[np.int64]
    checks: list[Future[None]]


@dataclass
class Drawn:
    """A batch for DALI, which reads the arrays in place."""

    samples: NDArray[np.int64]
    """[N]; those that stand in for bad ones among them."""
    params: ViewParams
    """[N, V]."""
    inputs: Inputs


class BatchMaker:
    """From a batch's number to what DALI takes.

    Args:
        beton: the open file.
        recipe: of the views.
        plan: of the epochs; its seed is that of the parameters, too.
        bad_samples: what happens to a sample that cannot be decoded.
        check: finds those.
        photometric: whose colours.
    """

    def __init__(
        self,
        beton: Beton,
        recipe: Recipe,
        plan: BatchPlan,
        bad_samples: BadSamples,
        check: JpegCheck,
        photometric: Photometric,
    ) -> None:
        self._beton, self._recipe, self._plan = beton, recipe, plan
        self._bad_samples, self._check, self._photometric = bad_samples, check, photometric
        self._data = np.asarray(beton.data)  # a plain array: a slice of the memory map's own class costs more
        self.raw = all_raw(beton)

    def plan_batch(self, epoch: int, batch: int) -> Planned:
        """Begin to check the samples of a batch."""
        self._beton.check_unchanged()
        samples = self._plan.samples(epoch, batch)
        return Planned(samples, self._check.start(samples))

    def draw_batch(self, planned: Planned, epoch: int) -> Drawn:
        """Put neighbours in the place of samples that cannot be decoded, and draw the parameters.

        Raises:
            ValueError: such a sample stops the run; or the file was changed since it was opened.
        """
        for check in planned.checks:
            check.result()
        self._beton.check_unchanged()
        samples = planned.samples
        for position in self._check.bad(samples).tolist():
            samples[position] = self._sound_neighbour(int(samples[position]))
        widths, heights = self._beton.widths[samples], self._beton.heights[samples]
        params = draw_views(self._recipe, self._plan.seed, epoch, samples, widths, heights)
        return Drawn(samples, params, self._inputs(samples, params))

    def one_by_one(self, drawn: Drawn) -> Iterator[Inputs]:
        """The samples of a batch, each as a batch of its own."""
        for i in range(len(drawn.samples)):
            yield self._inputs(drawn.samples[i : i + 1], drawn.params[i : i + 1])

    def _sound_neighbour(self, sample: int) -> int:
        tries = 0
        while (reason := self._check.reason(sample)) is not None:
            tries += 1
            sample = self._bad_samples.replace(sample, reason, tries)
        return sample

    def _inputs(self, samples: NDArray[np.int64], params: ViewParams) -> Inputs:
        begins, sizes = self._beton.offsets[samples].tolist(), self._beton.sizes[samples].tolist()
        images = [self._data[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
        if self.raw:
            shapes = zip(self._beton.heights[samples].tolist(), self._beton.widths[samples].tolist(), strict=True)
            images = [image.reshape(*shape, 3) for image, shape in zip(images, shapes, strict=True)]
        inputs: Inputs = [images]
        for v, view in enumerate(self._recipe.views):
            inputs.extend(view_inputs(params[:, v], view, self._photometric).values())
        return inputs


def all_raw(beton: Beton) -> bool:
    """Whether the samples are raw pixels; else they are JPEGs.

    Raises:
        ValueError: they are some of each, which one DALI pipeline cannot decode.
    """
    raw = beton.modes == MODE_RAW
    if raw.any() and not raw.all():
        raise ValueError(
            f"`data.loader: dali` needs samples that are all JPEGs or all raw, found {int(raw.sum())} raw ones among "
            f"the {beton.num_samples} of {beton.path}; set `data.loader` to `ffcv`"
        )
    return bool(raw.all())
