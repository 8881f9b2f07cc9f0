"""Tells by its first bytes what a file in a folder of images is, where it is no image that can be read.

Phones and cameras lay more than pictures into their folders: the film of a live photo, records of edits, raw files.
"""

HEAD_BYTES = 4096

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_STILL_BRANDS = frozenset({b"mif1", b"msf1", b"miaf", b"mif2", b"MiHB", b"MiHE", b"MiPr", b"tmap"})
_RAW_ADVICE = "; export it as JPEG or TIFF"

# (offset, bytes, what it is)
_SIGNATURES = (
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\0\0\1\xba", "an MPEG video"),
    (0, b"\0\0\1\xb3", "an MPEG video"),
    (4, b"moov", "a QuickTime video (.mov)"),
    (4, b"mdat", "a QuickTime video (.mov)"),
    (4, b"wide", "a QuickTime video (.mov)"),
    (0, b"FUJIFILMCCD-RAW", "a camera raw file (.raf)" + _RAW_ADVICE),
    (0, b"IIRO", "a camera raw file (.orf)" + _RAW_ADVICE),
    (0, b"IIRS", "a camera raw file (.orf)" + _RAW_ADVICE),
    (0, b"IIU\0", "a camera raw file (.rw2)" + _RAW_ADVICE),
    (0, b"FOVb", "a camera raw file (.x3f)" + _RAW_ADVICE),
    (8, b"CR\2\0", "a camera raw file (.cr2)" + _RAW_ADVICE),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to JPEG or PNG"),
    (0, b"\xff\x0a", "a JPEG XL image; convert it to JPEG or PNG"),
    (0, b"8BPS", "a Photoshop document; export it as JPEG or PNG"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
)
_RIFF = {b"AVI ": "an AVI video", b"WAVE": "a sound"}
_TEXTS = (
    (b"adjustmentformatidentifier", "a record of edits (.aae)"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)


def what_it_is(head: bytes) -> str | None:
    """What a file is that begins with `head` (4096 bytes are enough); None if it may be an image, or is unknown."""
    if head[4:8] == b"ftyp":
        return _of_brands(brands(head))
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    if head[:1] in (b"<", b"b", b"\xef", b" ", b"\n"):  # a text, or a binary property list
        text = head.lower()
        return next((kind for mark, kind in _TEXTS if mark in text), None)
    return None


def brands(head: bytes) -> set[bytes]:
    """The kinds that a file of the ISO family (MP4, HEIF, AVIF) claims to be."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))}


def is_heif(head: bytes) -> bool:
    """Whether it is a HEIC or HEIF picture, as phones take them; AVIF is not."""
    if head[4:8] != b"ftyp":
        return False
    found = brands(head)
    return not found & _AVIF_BRANDS and bool(found & _HEIF_BRANDS or head[8:12] in _STILL_BRANDS)


def _of_brands(found: set[bytes]) -> str | None:
    if found & (_HEIF_BRANDS | _AVIF_BRANDS | _STILL_BRANDS):
        return None
    if b"crx " in found:
        return "a camera raw file (.cr3)" + _RAW_ADVICE
    if b"qt  " in found:
        return "a QuickTime video (.mov)"
    return "a sound" if b"M4A " in found else "an MP4 video"
