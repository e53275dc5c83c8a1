"""Grids of known sizes (reference values of the release), and the rules around them."""

import pytest

from megatron_v2pe.data.media.tiling import (
    TileGrid,
    TilingRule,
    candidate_grids,
    choose_grid,
    rule_for_sample,
    tile_boxes,
)

KNOWN = [  # width, height, at most, columns, rows, tiles with thumbnail
    (640, 480, 12, 4, 3, 13),
    (1000, 1000, 12, 3, 3, 10),
    (900, 900, 12, 2, 2, 5),
    (1920, 1080, 12, 4, 2, 9),
    (448, 448, 12, 1, 1, 1),
    (672, 448, 12, 3, 2, 7),
    (100, 1000, 12, 1, 10, 11),
    (672, 448, 3, 2, 1, 3),
]


@pytest.mark.parametrize(("width", "height", "at_most", "columns", "rows", "tiles"), KNOWN)
def test_known_grids(width, height, at_most, columns, rows, tiles):
    grid = choose_grid(width, height, rule=TilingRule(image_size=448, max_tiles=at_most))
    assert (grid.columns, grid.rows, grid.num_tiles) == (columns, rows, tiles)


def test_order_of_grids_of_equal_area():
    assert candidate_grids(1, 5) == (
        *((1, 1), (1, 2), (2, 1), (3, 1), (1, 3)),
        *((4, 1), (1, 4), (2, 2), (1, 5), (5, 1)),
    )


def test_no_thumbnail_for_a_single_tile_or_when_switched_off():
    rule = TilingRule(image_size=448, use_thumbnail=False)
    assert choose_grid(640, 480, rule=rule).num_tiles == 12
    assert not choose_grid(448, 448, rule=TilingRule(image_size=448)).has_thumbnail


def test_tiling_switched_off_makes_one_tile():
    assert choose_grid(4000, 100, rule=TilingRule(image_size=448, dynamic=False)).num_tiles == 1


def test_tiles_shared_by_the_images_of_a_sample():
    rule = TilingRule(image_size=448, max_tiles=12, divide_by_images=True)
    assert rule_for_sample(rule, 5).max_tiles == 2
    assert rule_for_sample(rule, 1) is rule
    assert choose_grid(640, 480, rule=rule_for_sample(rule, 13)).num_tiles == 1  # quotient 0
    assert rule_for_sample(TilingRule(image_size=448), 5).max_tiles == 12


def test_boxes_go_row_by_row():
    grid = TileGrid(columns=2, rows=2, has_thumbnail=True)
    assert tile_boxes(grid, 10) == [(0, 0, 10, 10), (10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 20, 20)]
