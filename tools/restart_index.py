"""The index of a JPEG's rows that lets training decode only some of them; see `pipelines.decode.rows`."""

from __future__ import annotations

from itertools import pairwise

from pipelines.decode.rows import APP9, INDEX_NAME, RST0, SOI, SOS


def add_row_index(jpeg: bytes) -> bytes:
    """A JPEG whose every row of blocks ends with a restart marker, and a segment that tells where the rows begin.

    Args:
        jpeg: with one restart interval a row; of one scan.
    """
    header_end = _end_of_headers(jpeg)
    starts = [header_end, *_restarts(jpeg, header_end)]
    end = jpeg.rindex(b"\xff\xd9")
    added = 4 + len(INDEX_NAME) + 4 * (len(starts) + 1)
    table = b"".join((start + added).to_bytes(4, "little") for start in (*starts, end))
    segment = bytes((0xFF, APP9)) + (added - 2).to_bytes(2, "big") + INDEX_NAME + table
    # Behind the first segment, JFIF's, which must stay the first.
    split = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:split] + segment + jpeg[split:]


def _end_of_headers(jpeg: bytes) -> int:
    assert jpeg[:2] == bytes((0xFF, SOI))
    at = 2
    while True:
        marker, at = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == SOS:
            return at


def _restarts(jpeg: bytes, start: int) -> list[int]:
    """Where the data behind each restart marker begins."""
    found = []
    at = jpeg.find(b"\xff", start)
    while at >= 0:
        if RST0 <= jpeg[at + 1] < RST0 + 8:
            found.append(at + 2)
        at = jpeg.find(b"\xff", at + 2)
    assert all(jpeg[b - 1] == RST0 + (jpeg[a - 1] - RST0 + 1) % 8 for a, b in pairwise(found))
    return found
