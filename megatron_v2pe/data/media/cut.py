"""From a decoded image to its tiles: padded, resized, cut, re-encoded as the release does it.

size --TilingRule--> grid        RGB image --resize to the grid--> crops, thumbnail last --> uint8 [n, 3, S, S]
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_v2pe.batch.packed_batch import split_rows, tile_shape
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.tiling import TileGrid, TilingRule, choose_grid

UInt8Array = NDArray[np.uint8]
Size = tuple[int, int]
Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class CutRule:
    """How the images of a sample are cut in one draw.

    Attributes:
        tiling: grid by size.
        pad_color: fill of the square that an image is padded to, if it is not tiled; None does not pad.
        augment: draws the JPEG quality of every tile; None does not re-encode.
        max_pixels: largest square that an image is padded to, width x height.
    """

    tiling: TilingRule
    pad_color: Color | None = None
    augment: np.random.Generator | None = None
    max_pixels: int = 2**62


@dataclass(frozen=True, kw_only=True)
class ImageTiles:
    """How one image is cut; no pixels.

    Attributes:
        size: (width, height) that the grid was chosen for.
        grid: its tiles.
        pad_color: fill of the square that the image is padded to before resizing; None does not pad.
        jpeg_qualities: re-encode each tile (the whole image when it is one tile without grid) as JPEG of
            that quality, the release's augmentation; empty does not.
    """

    size: Size
    grid: TileGrid
    pad_color: Color | None = None
    jpeg_qualities: tuple[int, ...] = ()


def plan_tiles(sizes: Sequence[Size], rule: CutRule) -> tuple[ImageTiles, ...]:
    """How images of some sizes are cut.

    Qualities of the JPEG augmentation are drawn uniformly from 75..100 for every tile, as in the release.

    Raises:
        DataError: the square that an image is padded to is too large.
    """
    pad_color = None if rule.tiling.dynamic else rule.pad_color
    largest = max((max(size) for size in sizes), default=0)
    if pad_color is not None and largest**2 > rule.max_pixels:
        raise DataError(
            f"padded to a square (data.pad2square) it has {largest} x {largest} pixels, more than "
            f"data.max_image_pixels = {rule.max_pixels}; scale the image down, or switch data.pad2square off"
        )
    grids = [choose_grid(width, height, rule=rule.tiling) for width, height in sizes]
    return tuple(
        ImageTiles(size=size, grid=grid, pad_color=pad_color, jpeg_qualities=_qualities(rule, grid))
        for size, grid in zip(sizes, grids, strict=True)
    )


def _qualities(rule: CutRule, grid: TileGrid) -> tuple[int, ...]:
    return () if rule.augment is None else tuple(rule.augment.integers(75, 101, size=grid.num_tiles).tolist())


def cut_tiles(
    image: Image.Image, tiles: ImageTiles, first: int, last: int, *, out: Sequence[UInt8Array]
) -> None:
    """Write tiles first..last-1 of a decoded RGB image to `out`.

    Args:
        image: RGB.
        tiles: how it is cut.
        first: first tile wanted.
        last: one past the last tile wanted.
        out: uint8 [last - first, 3, S, S] for every wanted size of tiles, row by row, the thumbnail last. Each is cut
            from the decoded image; the grid, its boxes and JPEG qualities are the same for all.
    """
    num_cells = tiles.grid.columns * tiles.grid.rows
    if tiles.pad_color is not None:
        image = _pad_to_square(image, tiles.pad_color)
    if num_cells == 1 and tiles.jpeg_qualities:
        image = _reencode(image, tiles.jpeg_qualities[0])
    for each in out:
        _cut_one_size(image, tiles, first, last, out=each)


def _cut_one_size(image: Image.Image, tiles: ImageTiles, first: int, last: int, *, out: UInt8Array) -> None:
    size, columns, rows = out.shape[-1], tiles.grid.columns, tiles.grid.rows
    num_cells = columns * rows
    found: list[UInt8Array] = []  # [S, S, 3] each
    if first < num_cells:
        resized = np.asarray(image.resize((size * columns, size * rows), Image.Resampling.BICUBIC))
        for cell in range(first, min(last, num_cells)):
            top, left = cell // columns * size, cell % columns * size
            found.append(resized[top : top + size, left : left + size])
    if last > num_cells:
        found.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    if num_cells > 1 and tiles.jpeg_qualities:
        qualities = tiles.jpeg_qualities[first:last]
        found = [
            np.asarray(_reencode(Image.fromarray(tile), quality))
            for tile, quality in zip(found, qualities, strict=True)
        ]
    for index, tile in enumerate(found):
        out[index] = tile.transpose(2, 0, 1)  # [S, S, 3] -> [3, S, S]


def empty_tiles(num_tiles: int, sizes: tuple[int, ...]) -> tuple[UInt8Array, list[UInt8Array]]:
    """Memory for tiles, and a view uint8 [num_tiles, 3, S, S] of it for every size.

    Channels lie together in memory, as Pillow has them: tiles are thus filled by plain copies; the device transposes
    them, where it costs nothing. Several sizes share rows uint8 [num_tiles, sum of 3 S S].
    """
    if len(sizes) > 1:
        rows = np.empty((num_tiles, *tile_shape(sizes)), dtype=np.uint8)
        return rows, split_rows(rows, sizes)
    (image_size,) = sizes
    tiles = np.empty((num_tiles, image_size, image_size, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    return tiles, [tiles]


def _pad_to_square(image: Image.Image, color: Color) -> Image.Image:
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
