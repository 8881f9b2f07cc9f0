"""Ask libjpeg-turbo, once a sample, whether a JPEG is whole, before DALI decodes it.

DALI cannot be left to judge. Measured with DALI 2.4 on the CPU: it fails a whole batch for a JPEG that ends early or
holds no JPEG, and says only which position of the batch; it decodes without a word one whose data are damaged but
end with a marker (grey or shifted blocks), one of another size than the file's table states, CMYK, and PNG.

Each JPEG is decoded to an eighth of its size in gray: all of its entropy-coded data are read, which is where
libjpeg-turbo finds damage, and next to nothing else is computed: 350 µs of a core for 53 KB of 500 pixels, where DALI
takes 2 ms for the image's two crops (EPYC, four cores). What a process has checked it does not check again; several
ranks meet new samples for some epochs. `FFCVLoader` decodes with the same library, and gives the same answers but for
damage in rows that none of its windows needs, which it does not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import MODE_RAW, Beton
from pipelines.beton_memory import check_images_fit
from pipelines.decode.turbojpeg import PIXEL_FORMAT_GRAY
from pipelines.pool import DecodePool, Worker

CHUNK = 16  # samples that a thread checks at a time: milliseconds of work, so that threads end together
SCALE = 8  # the smallest image that libjpeg-turbo decodes to is an eighth of the whole


class JpegCheck:
    """Remembers which samples of a file can be decoded.

    Args:
        beton: the file.
        num_threads: that check.

    Raises:
        ValueError: the largest images cannot be decoded in the free memory.
    """

    def __init__(self, beton: Beton, num_threads: int) -> None:
        check_images_fit(beton, num_threads)
        self._beton = beton
        self._pool = DecodePool(num_threads, [1])
        self._sound: NDArray[np.bool_] = np.array(beton.modes == MODE_RAW)
        self._reasons: dict[int, str] = {}

    def start(self, samples: NDArray[np.int64]) -> list[Future[None]]:
        """Begin to check those of `samples`, int64 [N], that never were; `bad` may be asked when all are done."""
        unknown = [int(sample) for sample in samples[~self._sound[samples]] if int(sample) not in self._reasons]
        chunks = (unknown[begin : begin + CHUNK] for begin in range(0, len(unknown), CHUNK))
        return [self._pool.submit(partial(self._check, chunk)) for chunk in chunks]

    def bad(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions in `samples`, int64 [N], of those that were found bad or were never checked."""
        return np.flatnonzero(~self._sound[samples])

    def reason(self, sample: int) -> str | None:
        """Why a sample cannot be decoded, or None; checks it now if it never was."""
        if not self._sound[sample] and sample not in self._reasons:
            self._pool.submit(partial(self._check, [sample])).result()
        return self._reasons.get(sample)

    def again(self, sample: int) -> str | None:
        """Check a sample anew: its bytes may have changed since."""
        if self._beton.modes[sample] != MODE_RAW:
            self._sound[sample] = False
            self._reasons.pop(sample, None)
        return self.reason(sample)

    def condemn(self, sample: int, reason: str) -> None:
        """Note that a sample cannot be decoded, whatever libjpeg-turbo says."""
        self._sound[sample] = False
        self._reasons[sample] = reason

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()

    def _check(self, samples: Sequence[int], worker: Worker) -> None:
        for sample in samples:
            width, height = int(self._beton.widths[sample]), int(self._beton.heights[sample])
            reason = _refusal(self._beton.encoded(sample), width, height, worker)
            if reason is None:
                self._sound[sample] = True
            else:
                self._reasons[sample] = reason


def _refusal(jpeg: NDArray[np.uint8], width: int, height: int, worker: Worker) -> str | None:
    """Why libjpeg-turbo does not decode `jpeg` to an image of that size, or None."""
    out = np.empty(-(-width // SCALE) * -(-height // SCALE), np.uint8)
    return worker.decompressor.decompress(jpeg, width, height, out, PIXEL_FORMAT_GRAY, SCALE)
