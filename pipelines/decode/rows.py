"""Decode only those rows of a JPEG that some window needs.

Seven tenths of a decode are entropy decoding, which goes through a file bit by bit and cannot skip. Restart markers are
where it may begin anew. `tools.convert` therefore ends every row of blocks with one, and puts an index of the rows into
an application segment, which other decoders pass over. Out of such a file a shorter one is made: the same headers with
a lower height, and the rows that are needed.

One row of pixels beyond a window is kept, since the interpolation of 4:2:0 chroma looks at a neighbouring row; so the
pixels in the window are those of a whole decode, bit by bit. The index is believed only as far as it fits the file.

Sources: ITU-T T.81 (JPEG), annex B; libjpeg-turbo's jdsample.c for the interpolation.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MAX_BYTES = 2**20  # of a file that is shortened: more would only be a larger scratch

SOI, SOF0, EOI, SOS, DRI, RST0, APP9 = 0xD8, 0xC0, 0xD9, 0xDA, 0xDD, 0xD0, 0xE9
INDEX_NAME = b"TWVROWS\0"
"""Begins the segment APP9 of the index. Behind it, as little-endian 32-bit numbers: where each row of blocks begins in
the file, and where the marker behind the last one is."""
_NAME = np.frombuffer(INDEX_NAME, np.uint8)


@njit(nogil=True)
def keep_rows(encoded, width, height, top, bottom, out):
    """Make a JPEG of some rows of another one.

    Args:
        encoded: uint8 [bytes]; the JPEG.
        width: of the image, pixels.
        height: likewise.
        top: first row that is needed.
        bottom: one past the last.
        out: uint8 scratch [MAX_BYTES]; written.

    Returns:
        The bytes written to `out`, the row of the image that is its first, and its height; 0 bytes where the file has
        no index that fits it, or nothing can be left out.
    """
    nothing = (0, 0, height)
    if encoded.size > MAX_BYTES - 2 or encoded.size < 4 or encoded[0] != 0xFF or encoded[1] != SOI:
        return nothing
    header_end, sof, index, interval = _find_segments(encoded)
    if header_end == 0 or sof == 0 or index == 0:
        return nothing
    block_width, block_height = _block_size(encoded, sof)
    num_rows = -(-height // block_height)
    fits = (
        encoded[sof + 9] == 3
        and _big_16(encoded, sof + 5) == height
        and _big_16(encoded, sof + 7) == width
        and interval == -(-width // block_width)
        and _big_16(encoded, index + 2) == 2 + _NAME.size + 4 * (num_rows + 1)
    )
    if not fits:
        return nothing
    table = index + 4 + _NAME.size
    first, last = max(top - 1, 0) // block_height, min(-(-(bottom + 1) // block_height), num_rows)
    if first == 0 and last == num_rows:
        return nothing
    begin, end = _little_32(encoded, table + 4 * first), _little_32(encoded, table + 4 * last)
    if not (header_end <= begin < end <= encoded.size) or _little_32(encoded, table) != header_end:
        return nothing
    out[:header_end] = encoded[:header_end]
    kept = min((last - first) * block_height, height - first * block_height)
    out[sof + 5], out[sof + 6] = kept >> 8, kept & 0xFF
    if last < num_rows:
        end -= 2  # the marker behind the last row, whose place the end of the image takes
    size = header_end + end - begin
    out[header_end:size] = encoded[begin:end]
    for row in range(max(first, 1), min(last, num_rows - 1) + 1):  # also where the file is cut
        marker = _little_32(encoded, table + 4 * row) - 2
        if not header_end <= marker < encoded.size - 1 or encoded[marker] != 0xFF:
            return nothing
        if encoded[marker + 1] != RST0 + (row - 1) % 8:
            return nothing
        if first < row < last:
            if not begin <= marker < end - 1:
                return nothing
            out[header_end + marker - begin + 1] = RST0 + (row - first - 1) % 8
    out[size], out[size + 1] = 0xFF, EOI
    return size + 2, first * block_height, kept


@njit(nogil=True)
def _find_segments(encoded):
    """Where the headers end, where the frame header and the index begin, and the restart interval; 0 for none."""
    at, sof, index, interval = 2, 0, 0, 0
    while at + 4 <= encoded.size and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], _big_16(encoded, at + 2)
        after = at + 2 + length
        if after > encoded.size:
            break
        if marker == SOS:
            return after, sof, index, interval
        if marker == SOF0 and length >= 17:  # three components
            sof = at
        elif marker == DRI and length >= 4:
            interval = _big_16(encoded, at + 4)
        elif marker == APP9 and length >= 2 + _NAME.size and _is_index(encoded, at + 4):
            index = at
        at = after
    return 0, sof, index, interval


@njit(nogil=True)
def _is_index(encoded, at):
    for i in range(_NAME.size):
        if encoded[at + i] != _NAME[i]:
            return False
    return True


@njit(nogil=True)
def _block_size(encoded, sof):
    """Width and height in pixels of what a JPEG codes as a unit: 8 times the finest component's sampling."""
    across, down = 1, 1
    for component in range(3):
        sampling = encoded[sof + 11 + 3 * component]
        across, down = max(across, sampling >> 4), max(down, sampling & 15)
    return 8 * across, 8 * down


@njit(nogil=True)
def _big_16(encoded, at):
    return np.int64(encoded[at]) << 8 | np.int64(encoded[at + 1])


@njit(nogil=True)
def _little_32(encoded, at):
    low = np.int64(encoded[at]) | np.int64(encoded[at + 1]) << 8
    return low | np.int64(encoded[at + 2]) << 16 | np.int64(encoded[at + 3]) << 24
