"""Image files: bounded, inside their folder, and opened as late as possible.

    header (size, format) -> index        decode -> resize -> cut -> uint8 tiles

Every failure is a DataError that names the file. Images are taken as the release takes them: first frame,
no EXIF rotation, `convert("RGB")` whatever the mode, bicubic resizing. Which images of a pack are opened is
decided in `pixels.py`.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.frames import FrameRef
from megatron_v2pe.data.media.image_header import HEADER_BYTES, LONG_HEADER_BYTES, plain_header
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.data.sources import storage

UInt8Array = NDArray[np.uint8]
NormalizeType = Literal["imagenet", "clip", "siglip"]
Channels = tuple[float, float, float]

NORMALIZATION: dict[NormalizeType, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# What Pillow raises for files that are not images, are cut off, or carry broken compressed data.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, IndexError)
_HEADER_BYTES = 2**16  # of a remote image; enough for the size in all but files with large leading metadata
# Last bytes of a complete file; any other ending is settled by decoding the file once.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """One image of a sample and how it is cut; no pixels.

    Attributes:
        path: file; of a frame, its video; empty is no file, whose tiles are black.
        size: (width, height) that the grid was chosen for; a file that changed since is refused.
        grid: its tiles.
        pad_color: fill of the square that the image is padded to before resizing; None does not pad.
        jpeg_qualities: re-encode each tile (the whole image when it is one tile without grid) as JPEG of
            that quality, the release's augmentation; empty does not.
        max_pixels: largest width x height that is decoded.
        frame: which frame of a video it is; None is a still image.
    """

    path: str
    size: tuple[int, int]
    grid: TileGrid
    pad_color: tuple[int, int, int] | None = None
    jpeg_qualities: tuple[int, ...] = ()
    max_pixels: int = 178_956_970
    frame: FrameRef | None = None


@contextmanager
def open_image(path: str, *, max_pixels: int, header_only: bool = False) -> Iterator[Image.Image]:
    """Open an image (header only until it is used) and turn every failure into a DataError.

    Args:
        path: file or address.
        max_pixels: larger images are refused before anything is decoded.
        header_only: of a remote file take no more than the header if that is enough.

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


def image_size(path: str, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) from the file's header.

    Raises:
        DataError: missing, not an image, or larger than `max_pixels`.
    """
    with open_image(path, max_pixels=max_pixels, header_only=True) as image:
        return image.size


def check_image(path: str, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) of an image that is complete as far as its ending tells.

    A JPEG or PNG that ends with its end mark is taken as complete; anything else is decoded once.

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


def mean_color(normalize_type: NormalizeType) -> tuple[int, int, int]:
    """The mean of the normalisation as an 8-bit colour, rounded down as in the release."""
    red, green, blue = (int(channel * 255) for channel in NORMALIZATION[normalize_type][0])
    return red, green, blue


def load_tiles(
    ref: ImageRef,
    *,
    image_size: int,
    first: int = 0,
    last: int | None = None,
    out: UInt8Array | None = None,
) -> UInt8Array:
    """Decode an image and cut some of its tiles.

    Args:
        ref: image and grid.
        image_size: tile size S in pixels.
        first: first tile wanted.
        last: one past the last tile wanted; None is all.
        out: where to write them; None makes a new array.

    Returns:
        `out`: uint8 [last - first, 3, S, S], row by row, the thumbnail last.

    Raises:
        DataError: see `image_size`; also a file whose size changed since it was indexed.
    """
    last = ref.grid.num_tiles if last is None else last
    with open_image(ref.path, max_pixels=ref.max_pixels) as opened:
        if opened.size != ref.size:
            raise DataError(
                f"{ref.path}: is {opened.size[0]} x {opened.size[1]}, but was {ref.size[0]} x {ref.size[1]} when "
                "lengths were measured; remove data.cache_dir so that they are measured again"
            )
        image = opened.convert("RGB")
    return cut_tiles(image, ref, image_size=image_size, first=first, last=last, out=out)


def cut_tiles(
    image: Image.Image,
    ref: ImageRef,
    *,
    image_size: int,
    first: int = 0,
    last: int = 1,
    out: UInt8Array | None = None,
) -> UInt8Array:
    """Tiles first..last-1 of a decoded RGB image as uint8 [n, 3, S, S], written to `out` if given."""
    size, columns = image_size, ref.grid.columns
    if ref.pad_color is not None:
        image = _pad_to_square(image, ref.pad_color)
    num_cells = columns * ref.grid.rows
    if num_cells == 1 and ref.jpeg_qualities:
        image = _reencode(image, ref.jpeg_qualities[0])
    tiles: list[UInt8Array] = []  # [S, S, 3] each
    if first < num_cells:
        resized = np.asarray(image.resize((size * columns, size * ref.grid.rows), Image.Resampling.BICUBIC))
        for cell in range(first, min(last, num_cells)):
            top, left = cell // columns * size, cell % columns * size
            tiles.append(resized[top : top + size, left : left + size])
    if last > num_cells:
        tiles.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    if num_cells > 1 and ref.jpeg_qualities:
        qualities = ref.jpeg_qualities[first:last]
        tiles = [
            np.asarray(_reencode(Image.fromarray(tile), quality))
            for tile, quality in zip(tiles, qualities, strict=True)
        ]
    out = empty_tiles(len(tiles), size) if out is None else out
    for index, tile in enumerate(tiles):
        out[index] = tile.transpose(2, 0, 1)  # [S, S, 3] -> [3, S, S]
    return out


def empty_tiles(num_tiles: int, image_size: int) -> UInt8Array:
    """uint8 [num_tiles, 3, S, S] whose channels lie together in memory, as Pillow has them.

    Tiles are thus filled by plain copies; the device turns them round, where it costs nothing.
    """
    return np.empty((num_tiles, image_size, image_size, 3), dtype=np.uint8).transpose(0, 3, 1, 2)


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre the image in a square of `color`."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _reencode(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
