"""Picture files: bounded, inside their folder, and opened as late as possible.

    header (size, traits) -> index        decode -> EXIF, alpha by policy -> convert("RGB") -> `cut`

Every failure is a DataError that names the file. By default images are read as the release reads them: first frame,
no EXIF rotation, `convert("RGB")` whatever the mode. Only the formats below are opened, so that no other plug-in of
Pillow (Ghostscript for EPS among them) sees a file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from stat import S_ISREG
from typing import BinaryIO, ClassVar

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from megatron_v2pe.core.errors import DataError, V2PEError
from megatron_v2pe.data.media.cut import CutRule, ImageTiles, Size, UInt8Array, cut_tiles, plan_tiles
from megatron_v2pe.data.media.image_header import HEADER_BYTES, LONG_HEADER_BYTES, plain_header
from megatron_v2pe.data.media.medium import (
    IMAGE_PLACEHOLDER,
    HeaderOf,
    ImageHeader,
    MediaRules,
    MediumTiles,
)
from megatron_v2pe.data.media.traits import has_alpha, is_turned, orientation_of, traits_of
from megatron_v2pe.data.sources import storage
from megatron_v2pe.data.sources.file_kinds import kind_of

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_READ_KINDS = ("a JPEG image", "a PNG image", "a GIF image", "a WebP image")
_STRIP_ROWS = 256
MAX_SIDE = 65_535  # of width and height, as in JPEG; the tables of a resize grow with the side
_HEADER_BYTES = 2**16  # of a remote image; enough for the size in all but files with large leading metadata
_METADATA_BYTES = 64 * 2**20  # texts and profiles of one PNG, unpacked
# Share of the limit for formats whose decoder holds 16 (WebP) or up to 27 bytes (JPEG 2000, 4 for each layer and more)
# for each pixel, where others hold up to 12; measured on images of the limit.
_PIXEL_SHARES = {"WEBP": 0.75, "JPEG2000": 0.4}
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

    def probe(self, rules: MediaRules, *, sample_id: str, header_of: HeaderOf) -> tuple[ImageHeader, ...]:
        """Header of the image; see `read_header`."""
        return (header_of(self.path, rules),)

    def tiles(self, sizes: Sequence[Size], rule: CutRule) -> tuple[ImageTiles, ...]:
        """Its grid.

        Raises:
            DataError: see `cut.plan_tiles`.
        """
        try:
            return plan_tiles(sizes, rule)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def open_range(self, own: MediumTiles, first: int, last: int, out: Sequence[UInt8Array]) -> None:
        """Decode the image and cut some of its tiles.

        Raises:
            DataError: see `open_image`; also a file whose size changed since it was probed.
        """
        (tiles,) = own.images
        cut_tiles(read_rgb(self.path, own.rules, size=tiles.size), tiles, first, last, out=out)


def read_rgb(path: str, rules: MediaRules, *, size: Size | None = None) -> Image.Image:
    """The pixels of an image as RGB, by the policies of the run.

    Args:
        path: file or address.
        rules: limits and policies.
        size: (width, height) that it must have; None is any.

    Raises:
        DataError: see `open_image`; also another size.
    """
    with open_image(path, max_pixels=rules.max_pixels) as opened:
        orientation = orientation_of(opened) if rules.exif == "apply" else 1
        found = _seen_size(opened.size, orientation)
        if size is not None and found != size:
            raise DataError(
                f"{path}: is {found[0]} x {found[1]}, but was {size[0]} x {size[1]} when lengths were measured; "
                "remove data.cache_dir so that they are measured again"
            )
        if rules.alpha == "white" and has_alpha(opened):
            opened.load()
            image = _on_white(opened)
        else:
            opened.load()
            image = opened if opened.mode == "RGB" else opened.convert("RGB")  # no copy of what is RGB
        if _seen_size(image.size, orientation) != found:
            raise DataError(
                f"{path}: its header says {opened.size}, its pixels {image.size}; write the file anew"
            )
        if orientation > 1:
            image = image.transpose(_TURNS[orientation])
        return image


def _on_white(image: Image.Image) -> Image.Image:
    """A transparent image on white; in strips, so that no third copy of a large one is held."""
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))
        strip = strip if strip.mode == "RGBA" else strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _seen_size(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if is_turned(orientation) else size


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
    with _pillow_limits():
        try:
            with _opened_file(path, header_only) as file, Image.open(file, formats=_formats()) as image:
                _check_size(path, image.size, max_pixels, image_format=image.format or "")
                Image.MAX_IMAGE_PIXELS = max_pixels  # of whatever a decoder finds inside
                yield image
        except V2PEError:
            raise
        except FileNotFoundError:
            raise DataError(f"{path}: no such image; check the data set's root and the annotation") from None
        except MemoryError as error:
            raise DataError(f"{path}: not enough memory to read the image; scale it down") from error
        except Image.DecompressionBombError as error:
            raise DataError(
                f"{path}: holds a picture of more pixels than data.max_image_pixels = {max_pixels}; write the file anew"
            ) from error
        except Exception as error:  # decoders raise about ten kinds, from SyntaxError to RuntimeError
            raise _unreadable(path, error) from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(path: str, size: Size, max_pixels: int, *, image_format: str) -> None:
    width, height = size
    share = _PIXEL_SHARES.get(image_format, 1.0)
    if max_pixels * share < width * height <= max_pixels:
        raise DataError(
            f"{path}: {width} x {height} = {width * height} pixels, but decoding {image_format} needs more memory "
            f"than other formats, so its limit is {share:.0%} of data.max_image_pixels = {max_pixels}; scale it down, "
            "write it as PNG or JPEG, or raise the limit"
        )
    if width * height > max_pixels:
        raise DataError(
            f"{path}: {width} x {height} = {width * height} pixels exceed data.max_image_pixels = "
            f"{max_pixels}; scale the image down or raise the limit"
        )
    if max(size) > MAX_SIDE:
        raise DataError(
            f"{path}: {width} x {height}, but no side may exceed {MAX_SIDE}; cut or scale the image"
        )


def _unreadable(path: str, error: Exception) -> DataError:
    """What the file is if it is no image; else what the decoder says, on one line."""
    try:
        with _opened_file(path, header_only=True) as file:
            kind = kind_of(file.read(_HEADER_BYTES))
    except OSError:
        kind = ""
    if kind and kind not in _READ_KINDS:
        return DataError(
            f"{path}: cannot be read as an image: it is {kind}; formats that are read: {', '.join(FORMATS)}"
        )
    text = " ".join(str(error).split())[:200] or type(error).__name__
    text = (
        "its first bytes are of no format that is read" if isinstance(error, UnidentifiedImageError) else text
    )
    return DataError(f"{path}: cannot be read as an image ({text}); repair or remove the sample")


@contextmanager
def _pillow_limits() -> Iterator[None]:
    """No bound of Pillow's on the header, which is checked by ours, and room for the metadata of a PNG."""
    before = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _METADATA_BYTES, 2 * _METADATA_BYTES
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


@contextmanager
def _opened_file(path: str, header_only: bool) -> Iterator[BinaryIO]:
    if not storage.is_remote(path):
        with storage.open_binary(path) as file:
            yield file
        return
    if header_only:
        yield io.BytesIO(storage.read_range(path, 0, _HEADER_BYTES))
    else:
        yield io.BytesIO(storage.read_whole(path))


def check_image(path: str, max_pixels: int) -> Size:
    """(width, height) of an image that is complete as far as its ending shows; see `read_header`."""
    return read_header(path, MediaRules(max_pixels=max_pixels)).size


def read_header(path: str, rules: MediaRules) -> ImageHeader:
    """Size and traits of an image that is complete as far as its ending shows.

    A JPEG or PNG that ends with its end mark counts as complete; anything else is decoded once.

    Raises:
        DataError: missing, not an image, truncated, or larger than `rules.max_pixels`.
    """
    plain = None if storage.is_remote(path) else _plain_image(path)
    if (
        plain is not None
        and plain.size[0] * plain.size[1] <= rules.max_pixels
        and max(plain.size) <= MAX_SIDE
    ):
        return plain
    if storage.is_remote(path):
        return _remote_header(path, rules)
    with open_image(path, max_pixels=rules.max_pixels) as image:
        header = _header(image, rules)
        if not _has_end_mark(path, image.format):
            image.load()
        return header


def _remote_header(path: str, rules: MediaRules) -> ImageHeader:
    try:
        with open_image(path, max_pixels=rules.max_pixels, header_only=True) as image:
            if _has_end_mark(path, image.format):
                return _header(image, rules)
    except DataError:  # metadata in front of the size, or no image: the whole file decides
        pass
    with open_image(path, max_pixels=rules.max_pixels) as image:
        header = _header(image, rules)
        if not _has_end_mark(path, image.format):
            image.load()
        return header


def _header(image: Image.Image, rules: MediaRules) -> ImageHeader:
    orientation = orientation_of(image)
    size = _seen_size(image.size, orientation if rules.exif == "apply" else 1)
    return ImageHeader(size=size, traits=traits_of(image, orientation))


def _has_end_mark(path: str, image_format: str | None) -> bool:
    mark = _END_MARKS.get(image_format or "")
    return mark is not None and _tail(path, len(mark)) == mark


def _plain_image(path: str) -> ImageHeader | None:
    """Header of a local JPEG or PNG that is plain and ends with its end mark; None leaves the file to Pillow.

    Five calls of the system, which is why an index of new images is not ten times slower than one of known ones.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        if not S_ISREG(os.fstat(file).st_mode):
            return None
        found = plain_header(os.pread(file, HEADER_BYTES, 0))
        if found is None:
            found = plain_header(os.pread(file, LONG_HEADER_BYTES, 0))
        if found is None:
            return None
        image_format, size, traits = found
        mark = _END_MARKS[image_format]
        end = os.lseek(file, 0, os.SEEK_END)
        is_whole = os.pread(file, len(mark), end - len(mark)) == mark
        return ImageHeader(size=size, traits=traits) if is_whole else None
    except OSError:
        return None
    finally:
        os.close(file)


def _tail(path: str, num_bytes: int) -> bytes:
    if storage.is_remote(path):
        return storage.read_range(path, -num_bytes, None)
    with storage.open_binary(path) as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - num_bytes))
        return file.read()
