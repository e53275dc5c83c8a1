"""Image files: sound ones of every format with bytes changed, cut, doubled or swapped, and files of other kinds.

A file is an image of a size within the bound, or a DataError that names it and is short. Nothing else, and in no time.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, features

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.image import read_header, read_rgb
from megatron_v2pe.data.media.medium import MediaRules

Case = tuple[str, bytes]
MOST_SECONDS, MOST_MESSAGE = 5.0, 2000
RULES = (MediaRules(max_pixels=4 * 10**6), MediaRules(max_pixels=4 * 10**6, exif="apply", alpha="white"))
_HEADS = (b"\0\0\1\0", b"icns", b"DDS ", b"%!PS-Adobe", b"8BPS", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
          b"II*\0", b"MM\0*", b"RIFF", b"P6 9999 9999 255\n", b"BM", b"\0\0\0\x18ftypheic",
          b"<svg", b"P5 1 1 70000\n")  # fmt: skip


@lru_cache(maxsize=1)
def _sound() -> tuple[bytes, ...]:
    """Small files of every format that is read, plain and odd."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    picture, exif = Image.fromarray(pixels, "RGBA"), Image.Exif()
    exif[0x0112] = 6
    kinds = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"),
             ("PNG", "I;16"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("WEBP", "RGBA"),
             ("PPM", "RGB")]  # fmt: skip
    kinds += [("AVIF", "RGB")] if features.check("avif") else []
    kinds += [("JPEG2000", "RGB")] if features.check("jpg_2000") else []
    files = []
    for image_format, mode in kinds:
        image = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert("RGB").convert(mode)
        buffer = io.BytesIO()
        options = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP") else {}
        image.save(buffer, image_format, **options)
        files.append(buffer.getvalue())
    return tuple(files)


def generate(seed: int, count: int) -> Iterator[Case]:
    """Some files, the same for the same seed."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        content = bytearray(draw.choice(_sound()))
        for _ in range(draw.randint(0, 6)):
            _change(content, draw)
        yield f"image-{seed}-{number}", bytes(content)


def _change(content: bytearray, draw: random.Random) -> None:
    place = draw.randrange(max(len(content), 1))
    kind = draw.random()
    if kind < 0.5:
        place = draw.randrange(min(len(content), 64)) if kind < 0.25 and content else place
        content[place : place + 1] = bytes([draw.randrange(256)])
    elif kind < 0.6:
        del content[place:]
    elif kind < 0.7:
        content[place:place] = content[: draw.randint(0, 200)]
    elif kind < 0.8:
        content[place : place + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\1\0\0"])
    elif kind < 0.9:
        head = draw.choice(_HEADS)
        content[: len(head)] = head
    else:
        content += draw.choice(_sound())


def check(case: Case) -> str:
    """`ok` or the message of a DataError.

    Raises:
        AssertionError: a long message, a size beyond the bound, pixels of another size, or more than 5 seconds.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.png"
        path.write_bytes(case[1])
        outcomes = [_outcome(str(path), rules) for rules in RULES]
    assert time.monotonic() - started < MOST_SECONDS, f"{case[0]}: slow"
    assert all(len(outcome) < MOST_MESSAGE for outcome in outcomes), f"{case[0]}: a long message"
    return outcomes[0]


def named(error: DataError, beginning: str) -> str:
    """The message, which must begin with the place of the mistake."""
    if not str(error).startswith(beginning):
        raise AssertionError(f"does not name {beginning}: {error}")
    return str(error)


def _outcome(path: str, rules: MediaRules) -> str:
    try:
        size = read_header(path, rules).size
    except DataError as error:
        return named(error, path)
    assert 0 < size[0] * size[1] <= rules.max_pixels
    try:
        image = read_rgb(path, rules, size=size)
    except DataError as error:
        return named(error, path)
    assert (image.mode, image.size) == ("RGB", size)
    return "ok"
