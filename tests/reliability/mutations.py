"""Changes to a `.beton`, drawn from a seed: some know the format, and leave a file that is wrong in one place."""

import struct

from pipelines.beton_layout import (
    ALLOCATION_DTYPE,
)

SOF_MARKERS = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
SOS, DRI, DHT, APP9 = 0xDA, 0xDD, 0xC4, 0xE9
MARKERS = [bytes((marker,)) for marker in (0xC0, 0xC2, 0xC4, 0xC9, 0xCC, *range(0xD8, 0xDE), 0xE9, 0)]
SIDES = (0, 1, 2, 7, 8, 9, 16, 17, 255, 4096, 65499, 65500, 65501, 65535)
NO_IMAGES = (
    b"\xff\xd8\xff\xd9",
    b"\xff\xd8",
    b"\xff" * 50,
    b"\x89PNG\r\n\x1a\n" + bytes(40),
    b"GIF89a\1\0\1\0\0\0\0;",
)


def mutate(rng, draft):
    """One to three changes; `rng` is a `random.Random`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        choices = TABLE_CHANGES + (SAMPLE_CHANGES + JPEG_CHANGES * 2 if draft.jpegs else SAMPLE_CHANGES)
        rng.choice(choices)(rng, draft)


def any_number(rng, draft):
    position, size = rng.choice(draft.numbers[rng.choice(list(draft.numbers))])
    old, most, length = draft.number(position, size), 1 << (8 * size), len(draft.base)
    near = rng.choice((0, 1, -1, 2, -2, 8, -8, 24, -24, 4096, -4096))
    landmark = rng.choice((*draft.boundaries, length // 2))
    fixed = (0, 1, 2, 255, most - 1, most - 8, most // 2, most // 2 - 1)
    relative = (old + near, landmark + near, length + near, old ^ 1 << rng.randrange(8 * size))
    others = (rng.randrange(most), most - landmark, most // 3 + 1, 1 << 32, 1 << 40)
    draft.put_number(position, size, rng.choice((*fixed, *relative, *others)))


def cut_or_extend(rng, draft):
    length = rng.choice(draft.boundaries) + rng.choice((0, 0, 1, -1, 2, 8, -8, 23, 24, 25, -24, 1041))
    if rng.random() < 0.25:
        length = rng.randrange(len(draft.base))
    if length < len(draft.base):
        draft.resize(length)
    else:
        draft.resize(len(draft.base), rng.randbytes(rng.choice((1, 8, 23, 24, 48, 240, 4096))))


def swap_rows(rng, draft):
    """Two rows of the metadata or of the allocation table change places, or one stands twice."""
    if rng.random() < 0.5:
        start, size, num = draft.metadata, draft.row_size, len(draft.samples)
    else:
        start, size, num = draft.table, ALLOCATION_DTYPE.itemsize, draft.num_allocations
    a, b = (start + rng.randrange(num) * size for _ in range(2))
    first, second = bytes(draft.data[a : a + size]), bytes(draft.data[b : b + size])
    draft.put(b, first)
    if rng.random() < 0.5:
        draft.put(a, second)


def move_sample(rng, draft):
    """Both tables agree on another place and length."""
    sample = rng.choice(draft.samples)
    anywhere = rng.randrange(draft.first, draft.table)
    start = rng.choice((sample.start, draft.first, draft.end - 1, draft.table - 1, anywhere))
    room = draft.table - start
    size = rng.choice((0, 1, 2, room, room + 1, sample.size - 1, sample.size + 1, rng.randrange(room + 1)))
    draft.put_number(sample.pointer_at, 8, start)
    draft.put_number(sample.allocation_at + 8, 8, start)
    draft.put_number(sample.allocation_at + 16, 8, max(size, 0))


def some_bytes(rng, draft):
    start, end = rng.choice(((0, draft.metadata + 64), (draft.first, draft.end), (draft.table, len(draft.base))))
    for _ in range(rng.choice((1, 2, 4, 16))):
        draft.put(rng.randrange(start, end), rng.randbytes(1))


def bytes_of_a_sample(rng, draft):
    sample = rng.choice(draft.samples)
    for _ in range(rng.choice((1, 3, 10))):
        at = sample.start + rng.randrange(sample.size)
        draft.put(at, rng.choice((b"\0", b"\xff", b"\x7f", bytes((draft.data[at] ^ 1 << rng.randrange(8),)))))


def replace_sample(rng, draft):
    """By another one's bytes, or by no image."""
    sample, other = rng.choice(draft.samples), rng.choice(draft.samples)
    images = bytes(draft.data[other.start : other.start + other.size]), bytes(100), rng.randbytes(64)
    content = rng.choice((*images, *NO_IMAGES))[: sample.size]
    draft.put(sample.start, content)
    draft.put_number(sample.allocation_at + 16, 8, len(content))


def shift_bytes(rng, draft):
    """Some bytes of a sample are lost, or come in between."""
    sample = rng.choice(draft.samples)
    at, end = sample.start + rng.randrange(sample.size), sample.start + sample.size
    num, rest = rng.choice((1, 2, 3, 16)), bytes(draft.data[at:end])
    draft.put(at, rest[num:] + bytes(num) if rng.random() < 0.5 else (rng.randbytes(num) + rest)[: end - at])


def cut_sample(rng, draft):
    """The table says fewer bytes."""
    sample = rng.choice(draft.samples)
    ends = [at - sample.start + near for _, at, _ in sample.segments for near in (0, 1, 2, 3, 4, 10)]
    size = rng.choice([*ends, sample.size - 1, sample.size - 2, rng.randrange(sample.size)])
    draft.put_number(sample.allocation_at + 16, 8, max(size, 0))


def sides(rng, draft):
    """The frame header or the table, or both in agreement, say another size."""
    sample = rng.choice(draft.jpegs)
    frames = [at for marker, at, _ in sample.segments if marker in SOF_MARKERS]
    width, height = (
        rng.choice((*SIDES, draft.number(sample.image_at + i, 2) + rng.choice((0, 1, -1)))) for i in (1, 3)
    )
    which = rng.choice(("frame", "table", "both", "both"))
    if which != "table" and frames:
        draft.put(frames[0] + 5, struct.pack(">HH", height % 65536, width % 65536))
    if which != "frame":
        draft.put(sample.image_at + 1, struct.pack("<HH", width % 65536, height % 65536))


def a_segment(rng, draft):
    """A marker, a length, or what a segment says."""
    sample = rng.choice(draft.jpegs)
    _, at, length = rng.choice(sample.segments)
    what = rng.randrange(4)
    if what == 0:
        draft.put(at + 1, rng.choice(MARKERS))
    elif what == 1:
        draft.put(at + 2, struct.pack(">H", rng.choice((0, 1, 2, 3, 7, 8, 65535, length - 1, length + 1)) % 65536))
    else:
        for _ in range(rng.choice((1, 2, 8))):
            value = rng.choice((0, 1, 0x11, 0x22, 0x44, 255, rng.randrange(256)))
            draft.put(at + 4 + rng.randrange(max(length - 2, 1)), bytes((value,)))


def frame_or_scan(rng, draft):
    """Components, sampling, tables, spectral selection, successive approximation, restart interval."""
    sample = rng.choice(draft.jpegs)
    chosen = [(at, length) for marker, at, length in sample.segments if marker in (*SOF_MARKERS, SOS, DRI)]
    if chosen:
        at, length = rng.choice(chosen)
        value = rng.choice((0, 1, 2, 3, 4, 0x12, 0x21, 0x41, 0x14, 63, 64, 255))
        draft.put(at + rng.randrange(4, max(length + 2, 5)), bytes((value,)))


def huffman_table(rng, draft):
    sample = rng.choice(draft.jpegs)
    tables = [(at, length) for marker, at, length in sample.segments if marker == DHT]
    if tables:
        at, length = rng.choice(tables)
        if rng.random() < 0.2:  # whose it is
            draft.put(at + 4, bytes((rng.choice((0x00, 0x01, 0x10, 0x11, 0x13, 0x20, 0xFF)),)))
        draft.put(at + 5 + rng.randrange(max(length - 3, 1)), rng.randbytes(rng.choice((1, 4, 16))))


def row_index(rng, draft):
    """An entry of our index of rows."""
    sample = rng.choice(draft.jpegs)
    for marker, at, length in sample.segments:
        if marker == APP9 and length > 14:
            entry = at + 12 + 4 * rng.randrange((length - 10) // 4)
            old = draft.number(entry, 4)
            near = (0, 1, old + 1, old - 1, old + 2, sample.size, sample.size - 1, 2**31, 2**32 - 1)
            draft.put_number(entry, 4, rng.choice((*near, rng.randrange(sample.size))))


def restart_markers(rng, draft):
    """Restart markers come, go, or are out of order."""
    sample = rng.choice(draft.jpegs)
    scan = max((at for marker, at, _ in sample.segments if marker == SOS), default=sample.start)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(min(scan + 8, sample.start + sample.size - 2), sample.start + sample.size - 1)
        draft.put(at, bytes((0xFF, rng.choice((0xD0, 0xD1, 0xD7, 0xD9, 0xDA, 0x00, 0xFF)))))


def scan_bomb(rng, draft):
    """The last scan's header again and again, to the end of the sample."""
    sample = rng.choice(draft.jpegs)
    scans = [(at, length) for marker, at, length in sample.segments if marker == SOS]
    if scans:
        at, length = scans[-1]
        header = bytes(draft.data[at : at + 2 + length]) + b"\0" * rng.choice((0, 1, 2))
        room = sample.start + sample.size - at
        draft.put(at, (header * (room // len(header) + 1))[:room])


TABLE_CHANGES = (any_number, any_number, any_number, cut_or_extend, swap_rows, move_sample, some_bytes)
SAMPLE_CHANGES = (bytes_of_a_sample, replace_sample, shift_bytes, cut_sample)
JPEG_CHANGES = (sides, a_segment, frame_or_scan, huffman_table, row_index, restart_markers, scan_bomb)
