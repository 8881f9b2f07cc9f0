"""Our views for people who keep `ffcv.Loader`: one decode an image, all views from it.

    beton = open_beton("train.beton")
    decoder = MultiViewDecoder(beton, build_recipe(AugmentConfig()), num_threads=8)
    loader = ffcv.Loader("train.beton", batch_size=256, pipelines={"image": [decoder, ToTensor()], "label": None})
    for epoch in range(100):
        decoder.set_epoch(epoch)
        for views, label in loader:  # views [N, V, S, S, 3]
            ...

FFCV's thread hands each batch to the same engine that drives our own loader, so the views are the same bit by bit. What
is FFCV's stays FFCV's: the order of the images, and batches that later ones overwrite.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.state import State
from numba import objmode
from numpy.typing import NDArray

from pipelines.bad_samples import OnError, bad_samples_of
from pipelines.beton import Beton
from pipelines.recipe import Recipe
from pipelines.rendering import Renderer

logger = logging.getLogger(__name__)


class MultiViewDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """The first operation of an image field's pipeline: from stored images to their views.

    (FFCV takes an operation for a decoder of images if it descends from one of its own.)

    Its result is [N, V, S, S, 3]: uint8 crops, or float32 finished and normalised views.

    Args:
        beton: the file that the loader reads.
        recipe: of the views, which all have one size.
        seed: of every view.
        output: `crops`, before the photometric chain, or finished `views`.
        num_threads: that decode; FFCV's `num_workers` has no part in it.
        on_error: `raise` names a sample that cannot be decoded in the log, and interrupts the main thread, since an
            exception in FFCV's own thread would leave the program waiting for ever; `skip` uses its neighbour.
        scaled_decode: decode JPEGs at half or quarter scale where no window becomes smaller than its view.

    Raises:
        ValueError: the views differ in size.
    """

    def __init__(
        self,
        beton: Beton,
        recipe: Recipe,
        *,
        seed: int = 0,
        output: Literal["crops", "views"] = "crops",
        num_threads: int = 1,
        on_error: OnError = "raise",
        scaled_decode: bool = False,
    ) -> None:
        super().__init__()
        sizes = {view.size for view in recipe.views}
        if len(sizes) > 1:
            raise ValueError(
                f"`recipe` must have views of one size for ffcv.Loader, got {sorted(sizes)}; use FFCVLoader"
            )
        self._beton, self._epoch = beton, 0
        self._shape = (len(recipe.views), *sizes, *sizes, 3)
        self._dtype = np.dtype(np.float32 if output == "views" else np.uint8)
        self._renderer = Renderer(
            beton,
            recipe,
            seed,
            target=output,
            num_threads=num_threads,
            scaled_decode=scaled_decode,
            pinned=False,
            bad_samples=bad_samples_of(beton, on_error),
            by_image=True,
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose parameters are drawn from now on; call it before each pass over the loader."""
        self._epoch = epoch

    def close(self) -> None:
        """Stop the decoding threads."""
        self._renderer.close()

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """For FFCV: what comes out.

        Raises:
            ValueError: the loader reads another file than the one given.
        """
        if not np.array_equal(self.metadata["data_ptr"], self._beton.offsets):
            raise ValueError(f"`beton` must be the file that the loader reads, got {self._beton.path}")
        state = replace(previous_state, jit_mode=True, shape=self._shape, dtype=self._dtype)
        return state, AllocationQuery(self._shape, self._dtype)

    def generate_code(self) -> Callable[..., Any]:
        """For FFCV: the code that it compiles into its own."""
        render = self._render

        def decode(batch_indices, destination, metadata, storage_state):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            with objmode():
                render(batch_indices, destination)
            return destination[: len(batch_indices)]

        return decode

    def _render(self, samples: NDArray[np.int64], destination: NDArray[Any]) -> None:
        try:
            out = torch.from_numpy(destination[: len(samples)].reshape(-1))
            self._renderer.wait(self._renderer.start(self._epoch, samples.astype(np.int64), out))
        except ValueError as error:
            logger.critical("%s", error)
            # A real signal, since the main thread sits in a lock that nothing else would open.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
            raise
