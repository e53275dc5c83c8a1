"""Dynamic tiling: which grid an image is cut into, from its size alone.

    640 x 480, at most 12 tiles  ->  4 columns x 3 rows of S x S pixels, then the whole image as a thumbnail

The image is resized to (S*columns, S*rows), ignoring its aspect ratio, and cut row by row. All of this follows
from width and height, so lengths are known before any pixel is decoded.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True, kw_only=True)
class TilingRule:
    """How images of a data set are tiled.

    Attributes:
        image_size: tile size S in pixels.
        dynamic: cut into a grid; false makes one tile of each image.
        min_tiles: fewest tiles, thumbnail excluded.
        max_tiles: most tiles, thumbnail excluded.
        use_thumbnail: append the whole image when it was cut into several tiles.
        divide_by_images: `max_tiles` is shared by the images of a sample.
    """

    image_size: int
    dynamic: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    divide_by_images: bool = False


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """The tiles of one image: `columns` x `rows`, row by row, and perhaps a thumbnail as the last."""

    columns: int
    rows: int
    has_thumbnail: bool

    @property
    def num_tiles(self) -> int:
        """Tiles, thumbnail included."""
        return self.columns * self.rows + self.has_thumbnail


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of min_tiles..max_tiles tiles, by area.

    Grids of the same area are in the order of a Python set filled by rising size, because that order
    decides the release's ties between grids of equal area (500 x 400 at exactly 2 tiles). Tuples of small
    integers hash the same in every CPython process.
    """
    grids: set[tuple[int, int]] = set()
    for size in range(min_tiles, max_tiles + 1):
        for columns in range(1, size + 1):
            for rows in range(1, size + 1):
                if min_tiles <= columns * rows <= max_tiles:
                    grids.add((columns, rows))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=64)
def _grids_by_ratio(min_tiles: int, max_tiles: int) -> tuple[list[float], list[list[int]]]:
    """The aspect ratios of the candidates, rising, and the numbers of the candidates of each."""
    numbers: dict[float, list[int]] = {}
    for number, (columns, rows) in enumerate(candidate_grids(min_tiles, max_tiles)):
        numbers.setdefault(columns / rows, []).append(number)
    ratios = sorted(numbers)
    return ratios, [numbers[ratio] for ratio in ratios]


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, *, rule: TilingRule) -> TileGrid:
    """The grid whose aspect ratio is nearest to the image's.

    Of equally near grids the later one in `candidate_grids` wins if the image has more than half of its
    pixels, so a large image gets more tiles. A rule that allows no grid (`max_tiles` 0 after division) makes
    one tile.

    Args:
        width: pixels.
        height: pixels.
        rule: see `rule_for_sample` for samples with several images.
    """
    if not rule.dynamic:
        return TileGrid(columns=1, rows=1, has_thumbnail=False)
    grids = candidate_grids(rule.min_tiles, rule.max_tiles)
    nearest = _nearest(width / height, rule)
    columns, rows = grids[nearest[0]] if nearest else (1, 1)
    for number in nearest[1:]:
        if width * height > 0.5 * rule.image_size**2 * grids[number][0] * grids[number][1]:
            columns, rows = grids[number]
    return TileGrid(columns=columns, rows=rows, has_thumbnail=rule.use_thumbnail and columns * rows > 1)


def _nearest(aspect: float, rule: TilingRule) -> list[int]:
    """Numbers of all candidates that are nearest to an aspect ratio, rising: of one ratio, or of its two neighbours."""
    ratios, numbers = _grids_by_ratio(rule.min_tiles, rule.max_tiles)
    above = bisect_left(ratios, aspect)
    if above == 0:
        return numbers[0] if numbers else []
    if above == len(ratios):
        return numbers[-1]
    below, distance = aspect - ratios[above - 1], ratios[above] - aspect
    if below == distance:
        return sorted(numbers[above - 1] + numbers[above])
    return numbers[above - 1] if below < distance else numbers[above]


def rule_for_sample(rule: TilingRule, num_images: int) -> TilingRule:
    """The rule for each image of a sample with `num_images` images."""
    if not rule.divide_by_images or num_images <= 1:
        return rule
    return replace(rule, max_tiles=rule.max_tiles // num_images)


def tile_boxes(grid: TileGrid, image_size: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each tile in the resized image, thumbnail excluded."""
    corners = [
        (column * image_size, row * image_size) for row in range(grid.rows) for column in range(grid.columns)
    ]
    return [(left, top, left + image_size, top + image_size) for left, top in corners]
