"""Positions by hand, and against a walk over the tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.v2pe.layout import SampleLayout, find_images, pack_layout, text_layout
from megatron_v2pe.v2pe.positions import position_units, visual_rows


def layout_of(segments, tokens_per_tile):
    """Segments: an int is that many text tokens, a pair is (tiles, stride) of an image."""
    starts, tiles, strides, at = [], [], [], 0
    for segment in segments:
        if isinstance(segment, int):
            at += segment
        else:
            starts.append(at)
            tiles.append(segment[0])
            strides.append(segment[1])
            at += segment[0] * tokens_per_tile
    as_int = lambda values: np.array(values, dtype=np.int64)  # noqa: E731
    return SampleLayout(
        num_tokens=at,
        image_starts=as_int(starts),
        num_tiles=as_int(tiles),
        strides=as_int(strides),
        tokens_per_tile=tokens_per_tile,
    )


def walk(segments, tokens_per_tile, extra=0):
    """The paper's rule, token by token."""
    units, at = [], -tokens_per_tile
    for segment in [*segments, extra]:
        count, step = (segment, tokens_per_tile)
        if not isinstance(segment, int):
            count, step = segment[0] * tokens_per_tile, segment[1]
        for _ in range(count):
            at += step
            units.append(at)
    return units


def test_golden_example_of_the_release():
    """Five text tokens, <img> at 5, two tiles of 256 at stride 64: 5.25, 133, then 134 and 135."""
    layout = layout_of([6, (2, 64), 2], 256)
    positions = position_units(pack_layout([layout])) / 256
    assert positions[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert positions[6] == 5.25
    assert positions[6 + 511] == 133.0
    assert positions[-2:].tolist() == [134.0, 135.0]
    assert layout.next_position == 136


def test_default_stride_counts_every_token():
    layout = layout_of([3, (2, 4), 1, (1, 4), 2], 4)
    assert (position_units(pack_layout([layout])) // 4).tolist() == list(range(layout.num_tokens))


def test_documents_restart_and_padding_goes_on_in_whole_steps():
    pack = pack_layout([layout_of([2, (1, 1), 1], 4), text_layout(3, tokens_per_tile=4)], pad_to_multiple=4)
    assert pack.cu_seqlens.tolist() == [0, 8, 12]
    assert position_units(pack).tolist() == [0, 4, 5, 6, 7, 8, 12, 16, 0, 4, 8, 12]


segments_strategy = st.lists(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 8))), min_size=1, max_size=8
)


@given(segments_strategy, st.sampled_from([1, 3, 4, 8]), st.data())
@settings(max_examples=200, deadline=None)
def test_any_range_equals_the_walk(segments, tokens_per_tile, data):
    layout = layout_of(segments, tokens_per_tile)
    pack = pack_layout([layout], pad_to_multiple=4)
    whole = walk(segments, tokens_per_tile, extra=pack.num_tokens - layout.num_tokens)
    start = data.draw(st.integers(0, pack.num_tokens - 1))
    stop = data.draw(st.integers(start, pack.num_tokens))
    assert position_units(pack, np.array([[start, stop]])).tolist() == whole[start:stop]
    assert (
        layout.next_position * tokens_per_tile == walk(segments, tokens_per_tile, extra=1)[layout.num_tokens]
    )


@given(segments_strategy, st.data())
@settings(max_examples=100, deadline=None)
def test_positions_rise(segments, data):
    units = position_units(pack_layout([layout_of(segments, 4)]))
    assert (np.diff(units) > 0).all()


def test_positions_beyond_float32_stay_apart():
    layout = layout_of([70_000, (1, 1), 1], 256)
    units = position_units(pack_layout([layout]), np.array([[70_000, 70_256]]))
    assert len(set(units.tolist())) == 256
    assert len(set((units / 256).astype(np.float32).tolist())) == 129  # why positions are integers


def test_visual_rows_number_features_over_the_pack():
    pack = pack_layout([layout_of([1, (1, 1), 1], 2), layout_of([2, (2, 1)], 2)], pad_to_multiple=1)
    ranges = np.array([[0, 3], [5, 8]])
    slots, rows = visual_rows(pack, ranges)
    assert slots.tolist() == [1, 2, 4, 5]  # tokens 1, 2 of document 0; tokens 6, 7 of the pack are local 4, 5
    assert rows.tolist() == [0, 1, 2, 3]


def test_a_range_across_documents_is_refused():
    pack = pack_layout([text_layout(3, tokens_per_tile=4), text_layout(3, tokens_per_tile=4)])
    with pytest.raises(ValueError, match="crosses the end of document 0"):
        position_units(pack, np.array([[2, 4]]))


def test_find_images_and_its_refusals():
    tokens = np.array([1, 9, 9, 2, 9, 9, 9, 9, 3])
    assert find_images(tokens, image_token_id=9, num_tiles=[1, 2], tokens_per_tile=2).tolist() == [1, 4]
    with pytest.raises(ValueError, match="6 visual tokens for 4"):
        find_images(tokens, image_token_id=9, num_tiles=[1, 1], tokens_per_tile=2)
    with pytest.raises(ValueError, match="uninterrupted"):
        find_images(tokens, image_token_id=9, num_tiles=[2, 1], tokens_per_tile=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": np.array([0])}, "at least 1"),
        ({"num_tiles": np.array([3])}, "overlap or exceed"),
        ({"strides": np.array([1, 1])}, "differ in length"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    good = dict(
        num_tokens=10,
        image_starts=np.array([2]),
        num_tiles=np.array([2]),
        strides=np.array([1]),
        tokens_per_tile=4,
    )
    SampleLayout(**good)
    with pytest.raises(ValueError, match=message):
        SampleLayout(**{**good, **change})
