"""Pixels of a prompt, opened when a prefill chunk needs them and not before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.medium import MediumTiles, load_tile_range
from megatron_v2pe.data.sources import storage

_READ_BYTES = 2**20


class TileSource(Protocol):
    """Tiles of a prompt, numbered over its images.

    Attributes:
        tile_size: S, pixels of a tile's side.
        opened: tiles that were decoded so far.
    """

    tile_size: int
    opened: int

    def load(self, first: int, last: int) -> np.ndarray:
        """Tiles first..last-1: uint8 [n, 3, S, S], or float32 when they are normalised already.

        Raises:
            DataError: an image cannot be read.
        """

    def digests(self) -> tuple[str, ...]:
        """What identifies the pixels of each image: two images of the same digest have the same tiles."""


class ArrayTiles:
    """Tiles that are in memory, `images` of them to an image.

    Args:
        tiles: [n, 3, S, S], uint8 or normalised float32.
        num_tiles: tiles of each image.
    """

    def __init__(self, tiles: np.ndarray, num_tiles: Sequence[int]) -> None:
        self._tiles, self._num_tiles = tiles, tuple(num_tiles)
        self.tile_size, self.opened = int(tiles.shape[-1]), 0

    def load(self, first: int, last: int) -> np.ndarray:
        """See `TileSource`."""
        self.opened += last - first
        return self._tiles[first:last]

    def digests(self) -> tuple[str, ...]:
        """See `TileSource`."""
        ends = np.cumsum(self._num_tiles).tolist()
        images = [self._tiles[end - count : end] for end, count in zip(ends, self._num_tiles, strict=True)]
        return tuple(hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images)


class FileTiles:
    """Tiles of image files and of frames of videos.

    Args:
        media: images and videos, in the order of their placeholders.
        tile_size: S.
        smaller_sizes: pixels of a tile's side in the smaller branches of a pyramid (PIIP).
    """

    def __init__(
        self, media: Sequence[MediumTiles], tile_size: int, smaller_sizes: tuple[int, ...] = ()
    ) -> None:
        self.media, self.tile_size, self.opened = tuple(media), tile_size, 0
        self.smaller_sizes = smaller_sizes

    def load(self, first: int, last: int) -> np.ndarray:
        """See `TileSource`. Images without a tile in the range are not opened."""
        self.opened += last - first
        return load_tile_range(
            self.media,
            image_size=self.tile_size,
            smaller_sizes=self.smaller_sizes,
            tile_range=(first, last),
        )

    def digests(self) -> tuple[str, ...]:
        """See `TileSource`: hash of the file's bytes, with how the image is cut and which frame it is."""
        found = []
        for each in self.media:
            assert each.medium is not None
            content = _file_digest(each.medium.path)
            found += [f"{content}/{image}/{number}" for number, image in enumerate(each.images)]
        return tuple(found)


def _file_digest(path: str) -> str:
    try:
        if storage.is_folder(path):
            return str([(name, storage.file_facts(f"{path}/{name}")) for name in storage.list_files(path)])
        return _content_digest(path, tuple(storage.file_facts(path)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


@lru_cache(maxsize=4096)  # frames of a video share a file; a file that was written anew has other facts
def _content_digest(path: str, facts: tuple[str | int, ...]) -> str:
    digest = hashlib.sha256()
    with storage.open_binary(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
