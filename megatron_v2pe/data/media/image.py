"""Picture files: bounded, inside their folder, and opened as late as possible.

    header (size, format) -> index        decode -> convert("RGB") -> `cut`

Every failure is a DataError that names the file. Images are read as the release reads them: first frame,
no EXIF rotation, `convert("RGB")` whatever the mode.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import CutRule, ImageTiles, Size, UInt8Array, cut_tiles, plan_tiles
from megatron_v2pe.data.media.image_header import HEADER_BYTES, LONG_HEADER_BYTES, plain_header
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, MediaRules, MediumTiles, SizeOf
from megatron_v2pe.data.sources import storage

# What Pillow raises for files that are not images, are cut off, or carry broken compressed data.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, IndexError)
_HEADER_BYTES = 2**16  # of a remote image; enough for the size in all but files with large leading metadata
# Last bytes of a complete file; a file with any other ending is decoded once.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A picture file or its address; a `medium.Medium` that shows one image."""

    path: str

    placeholder: ClassVar[str] = IMAGE_PLACEHOLDER
    num_images: ClassVar[int | None] = 1
    way_to_shorten: ClassVar[str] = ""

    def text(self, num_images: int) -> str:
        """The placeholder itself."""
        return IMAGE_PLACEHOLDER * num_images

    def probe(self, rules: MediaRules, *, sample_id: str, size_of: SizeOf) -> tuple[Size, ...]:
        """Size of the image; see `check_image`."""
        return (size_of(self.path, rules.max_pixels),)

    def tiles(self, sizes: Sequence[Size], rule: CutRule) -> tuple[ImageTiles, ...]:
        """Its grid."""
        return plan_tiles(sizes, rule)

    def open_range(self, own: MediumTiles, first: int, last: int, out: Sequence[UInt8Array]) -> None:
        """Decode the image and cut some of its tiles.

        Raises:
            DataError: see `open_image`; also a file whose size changed since it was probed.
        """
        (tiles,) = own.images
        with open_image(self.path, max_pixels=own.rules.max_pixels) as opened:
            if opened.size != tiles.size:
                raise DataError(
                    f"{self.path}: is {opened.size[0]} x {opened.size[1]}, but was {tiles.size[0]} x {tiles.size[1]} "
                    "when lengths were measured; remove data.cache_dir so that they are measured again"
                )
            image = opened.convert("RGB")
        cut_tiles(image, tiles, first, last, out=out)


@contextmanager
def open_image(path: str, *, max_pixels: int, header_only: bool = False) -> Iterator[Image.Image]:
    """Open an image (header only until it is used) and turn every failure into a DataError.

    Args:
        path: file or address.
        max_pixels: larger images are refused before anything is decoded.
        header_only: of a remote file read no more than the header if that is enough.

    Raises:
        DataError: missing, not an image, or too large; also while the caller decodes it.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own bound is checked just below
    try:
        with _pillow_open(path, header_only) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{path}: {width} x {height} = {width * height} pixels exceed data.max_image_pixels = "
                    f"{max_pixels}; scale the image down or raise the limit"
                )
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; check the data set's root and the annotation") from None
    except _PILLOW_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as an image ({error}); repair or remove the sample"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _pillow_open(path: str, header_only: bool) -> Image.Image:
    if not storage.is_remote(path):
        return Image.open(path)
    if header_only:
        try:
            return Image.open(io.BytesIO(storage.read_range(path, 0, _HEADER_BYTES)))
        except (OSError, SyntaxError, ValueError):  # metadata in front of the size; the whole file decides
            pass
    return Image.open(io.BytesIO(storage.read_whole(path)))


def check_image(path: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) of an image that is complete as far as its ending shows.

    A JPEG or PNG that ends with its end mark counts as complete; anything else is decoded once.

    Raises:
        DataError: missing, not an image, truncated, or larger than `max_pixels`.
    """
    plain = None if storage.is_remote(path) else _plain_size(path)
    if plain is not None and plain[0] * plain[1] <= max_pixels:
        return plain
    with open_image(path, max_pixels=max_pixels, header_only=True) as image:
        size = image.size
        mark = _END_MARKS.get(image.format or "")
        if mark is not None and _tail(path, len(mark)) == mark:
            return size
        if not storage.is_remote(path):
            image.load()
            return size
    with open_image(path, max_pixels=max_pixels) as image:
        image.load()
        return image.size


def _plain_size(path: str) -> tuple[int, int] | None:
    """Size of a local JPEG or PNG that is plain and ends with its end mark; None leaves the file to Pillow.

    Four calls of the system, which is why an index of new images is not ten times slower than one of known ones.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    try:
        found = plain_header(os.pread(file, HEADER_BYTES, 0))
        if found is None:
            found = plain_header(os.pread(file, LONG_HEADER_BYTES, 0))
        if found is None:
            return None
        image_format, size = found
        mark = _END_MARKS[image_format]
        end = os.lseek(file, 0, os.SEEK_END)
        return size if os.pread(file, len(mark), end - len(mark)) == mark else None
    except OSError:
        return None
    finally:
        os.close(file)


def _tail(path: str, num_bytes: int) -> bytes:
    if storage.is_remote(path):
        return storage.read_range(path, -num_bytes, None)
    with open(path, "rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - num_bytes))
        return file.read()
