"""Size of a plain JPEG or PNG from its first bytes; whatever is not plain is left to Pillow.

    JPEG   SOI, segments that only carry data, one SOF of 1, 3 or 4 layers of 8 bits, segments, SOS
    PNG    signature, IHDR, PNG chunks that only carry data, IDAT

A mixture shows millions of images, and opening one by Pillow lasts longer than all the rest that the index does for it,
most of it for Pillow's own objects. So headers are read here where nothing in them can make Pillow think otherwise:
every segment is of a kind, and of a length, that Pillow accepts without an error. The rest (Exif, several pictures,
animations, broken checksums, a header longer than what was read) is None, and Pillow decides. That both agree on any
bytes is a property test.
"""

from __future__ import annotations

from struct import Struct
from zlib import crc32

from megatron_v2pe.data.media.traits import ALPHA, CMYK, DEEP

HEADER_BYTES = 1024  # enough for nearly all
LONG_HEADER_BYTES = 16384  # color profiles, texts
Header = tuple[str, tuple[int, int], tuple[str, ...]]
_Found = tuple[tuple[int, int], tuple[str, ...]]

_read_segment, _read_frame, _read_header = (
    Struct(layout).unpack_from for layout in (">BBH", ">BHHB", ">IIBBBB")
)
_SOS, _DQT, _APP2, _TABLE_BYTES = 0xDA, 0xDB, 0xE2, 65
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
# Least length of a segment that Pillow looks into: JFIF's version, Adobe's transform. The others it only keeps.
_SEGMENTS = {0xE0: 16, 0xEE: 14} | dict.fromkeys((0xC4, 0xDD, 0xFE, *range(0xE3, 0xED), 0xEF), 2)
_PROFILE = b"ICC_PROFILE\0"

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by color type
_WITH_ALPHA = (4, 6)
# Length of a PNG chunk between IHDR and IDAT; -1 is any.
_CHUNKS = {b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"PLTE": -1, b"tEXt": -1}


def plain_header(head: bytes) -> Header | None:
    """Format and size of an image.

    Args:
        head: the beginning of the file; `HEADER_BYTES` are mostly enough.

    Returns:
        (Pillow's name of the format, (width, height), its `media.traits`); None where `head` is too short or Pillow has
        to look.
    """
    if head.startswith(b"\xff\xd8\xff"):
        jpeg = _jpeg_image(head)
        return None if jpeg is None else ("JPEG", *jpeg)
    if head.startswith(_SIGNATURE):
        png = _png_image(head)
        return None if png is None else ("PNG", *png)
    return None


def _jpeg_image(head: bytes) -> _Found | None:
    place, end, found = 2, len(head), None
    while place + 4 <= end:
        fill, marker, length = _read_segment(head, place)
        start, place = place + 4, place + 2 + length
        if fill != 0xFF or length < 2 or place > end:
            return None
        if marker == _SOS:
            return found
        if marker in _FRAMES and found is None:
            found = _frame_image(head, start, length)
            if found is None:
                return None
        elif not _is_plain_segment(marker, length, head[start:place]):
            return None
    return None


def _is_plain_segment(marker: int, length: int, content: bytes) -> bool:
    """Whether Pillow would read over a segment without an error, whatever else it does with it."""
    if marker in _SEGMENTS:
        return length >= _SEGMENTS[marker]
    if marker == _DQT:
        return _is_plain_quantization(content)
    return marker == _APP2 and length >= 16 and content.startswith(_PROFILE)


def _is_plain_quantization(tables: bytes) -> bool:
    """Whether a segment holds whole tables of 8 bits."""
    return bool(tables) and not len(tables) % _TABLE_BYTES and max(tables[::_TABLE_BYTES]) <= 15


def _frame_image(head: bytes, start: int, length: int) -> _Found | None:
    """(width, height) and traits of a start of frame whose content begins at `start`."""
    if length < 11:
        return None
    bits, height, width, layers = _read_frame(head, start)
    is_plain = bits == 8 and layers in (1, 3, 4) and length == 8 + 3 * layers
    if not is_plain or not width or not height:
        return None
    return (width, height), (CMYK,) if layers == 4 else ()


def _png_image(head: bytes) -> _Found | None:
    if len(head) < 41 or not head.startswith(b"\0\0\0\rIHDR", 8) or not _is_sound(head, 8, 13):
        return None
    width, height, depth, color, _, filters = _read_header(head, 16)
    if depth not in _DEPTHS.get(color, ()) or filters or not width or not height:
        return None
    place = 33
    while (name := head[place + 4 : place + 8]) != b"IDAT":
        length = int.from_bytes(head[place : place + 4], "big")
        if _CHUNKS.get(name) not in (length, -1) or not _is_sound(head, place, length):
            return None
        place += 12 + length
    if color in _WITH_ALPHA:
        return (width, height), (ALPHA,)
    return (width, height), (DEEP,) if depth == 16 and color == 0 else ()


def _is_sound(head: bytes, place: int, length: int) -> bool:
    """Whether a PNG chunk lies within `head` and its checksum is right."""
    end = place + 8 + length
    return end + 4 <= len(head) and crc32(head[place + 4 : end]) == int.from_bytes(head[end : end + 4], "big")
