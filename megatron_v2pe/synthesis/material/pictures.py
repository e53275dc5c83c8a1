"""Images in and out: the pool of a folder's images, and the store of the images that records name.

    folder --hash, header--> pool of one split --copy or draw--> images/<2 digits>/<digest>.<suffix>

Files of the store are named by their content, so records share them, any number of workers may write the same one, and
a sample that is made again finds them. The pool's folder is never written to.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import sync_folder
from megatron_v2pe.core.processes import end_with_parent, worker_context
from megatron_v2pe.data.media.image import check_image
from megatron_v2pe.synthesis.split import digest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOLDER = "images"
SERVER_IMPORTS = "megatron_v2pe.synthesis.run"  # what workers of a run need, imported once
_FILES_PER_TASK = 64
_WORTH_PROCESSES = 2000
"""Fewer files are read sooner than processes are started."""


@dataclass(frozen=True, kw_only=True)
class PoolImage:
    """A source image.

    Attributes:
        path: file.
        digest: of its bytes.
        size: (width, height).
    """

    path: str
    digest: str
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a record names it: `name` below the output folder, and its (width, height)."""

    name: str
    size: tuple[int, int]


def image_files(folder: Path, *, option: str) -> list[Path]:
    """Image files below a folder, by path.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(
            f"{option}: {folder}: no such folder; give a folder of {', '.join(IMAGE_SUFFIXES)} files"
        )
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(f"{option}: {folder}: holds no file that ends with {', '.join(IMAGE_SUFFIXES)}")
    return found


def inspect(path: str, max_pixels: int) -> PoolImage | str:
    """A source image, or why it cannot be used."""
    try:
        size = check_image(path, max_pixels=max_pixels)
        return PoolImage(path=path, digest=digest(Path(path).read_bytes()), size=size)
    except DataError as error:
        return str(error)


def inspect_all(paths: Sequence[Path], *, max_pixels: int, workers: int) -> Iterator[PoolImage | str]:
    """`inspect` each file, in order; many files by several processes."""
    names = [str(path) for path in paths]
    if workers == 1 or len(names) < _WORTH_PROCESSES:
        yield from (inspect(name, max_pixels) for name in names)
        return
    with ProcessPoolExecutor(
        workers, mp_context=worker_context(SERVER_IMPORTS), initializer=end_with_parent
    ) as executor:
        yield from executor.map(inspect, names, repeat(max_pixels), chunksize=_FILES_PER_TASK)


class ImageStore:
    """Writes images under their content's name and flushes them together.

    Args:
        out: output folder; images go below `out/images`.

    Attributes:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._unflushed: list[Path] = []
        self._known: set[str] = set()

    def copy(self, image: PoolImage) -> Picture:
        """A source image as it is.

        Raises:
            DataError: the file cannot be read any more, or has changed since it was inspected.
        """
        name = _name(image.digest, Path(image.path).suffix.lower())
        if name not in self._known:
            try:
                content = Path(image.path).read_bytes()
            except OSError as error:
                raise DataError(f"{image.path}: cannot be read ({error.strerror})") from None
            if digest(content) != image.digest:
                raise DataError(f"{image.path}: has changed while data is made from it; start again")
            self._write(name, content)
        return Picture(name=name, size=image.size)

    def draw(self, image: Image.Image, *, lossy: bool) -> Picture:
        """An image that we made; `lossy` ones become JPEG, as their sources were."""
        buffer = io.BytesIO()
        if lossy:
            image.save(buffer, format="JPEG", quality=95)
        else:
            image.save(buffer, format="PNG", compress_level=3)
        name = _name(digest(buffer.getvalue()), ".jpg" if lossy else ".png")
        if name not in self._known:
            self._write(name, buffer.getvalue())
        return Picture(name=name, size=image.size)

    def path(self, picture: Picture) -> Path:
        """File of a stored image."""
        return self.out / picture.name

    def flush(self) -> None:
        """Bring everything written so far to the disk; a record that names an image is written after this."""
        for path in self._unflushed:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for folder in {path.parent for path in self._unflushed}:
            sync_folder(folder)
        self._unflushed.clear()

    def _write(self, name: str, content: bytes) -> None:
        path = self.out / name
        # A file of the right length may be one that a power cut left without its content.
        if not (path.exists() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            aside.write_bytes(content)
            os.replace(aside, path)
            self._unflushed.append(path)
        self._known.add(name)


def _name(content_digest: str, suffix: str) -> str:
    return f"{FOLDER}/{content_digest[:2]}/{content_digest}{suffix}"


def open_rgb(image: PoolImage) -> Image.Image:
    """Decoded pixels of a source image.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(image.path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{image.path}: cannot be read as an image ({error}); remove it") from None


def is_lossy(image: PoolImage) -> bool:
    """Whether the source is a JPEG."""
    return image.path.lower().endswith((".jpg", ".jpeg"))
