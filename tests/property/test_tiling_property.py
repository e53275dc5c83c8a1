"""The grid that is looked up is the one that a walk over all candidates finds. Exact."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_v2pe.data.media.tiling import TilingRule, candidate_grids, choose_grid

SIDES = st.integers(1, 3000) | st.integers(1, 10).map(lambda times: 448 * times) | st.integers(1, 10**7)


def by_walking(width, height, rule):
    """The release's rule, word for word: the nearest ratio, ties to the later grid if the image is large enough."""
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(rule.min_tiles, rule.max_tiles):
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * rule.image_size**2 * columns * rows:
            best = (columns, rows)
    return best


@given(
    width=SIDES,
    height=SIDES,
    least=st.integers(1, 4),
    most=st.integers(0, 40),
    image_size=st.sampled_from([28, 448]),
)
@settings(max_examples=1500, deadline=None)
@example(width=3, height=2, least=1, most=2, image_size=448)  # between 1 and 2, as near to both
@example(width=1344, height=896, least=1, most=2, image_size=448)
@example(width=5, height=2, least=1, most=12, image_size=28)
@example(width=500, height=400, least=1, most=0, image_size=448)  # no candidate
def test_the_nearest_grid_is_found(width, height, least, most, image_size):
    rule = TilingRule(image_size=image_size, min_tiles=least, max_tiles=most)
    grid = choose_grid(width, height, rule=rule)
    assert (grid.columns, grid.rows) == by_walking(width, height, rule)
