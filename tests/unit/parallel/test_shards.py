"""Sharding by documents, by eye and over all ranks: a partition in order, even, the same from the same numbers."""

import numpy as np
import pytest

from megatron_v2pe.parallel.shards import (
    AUTO_ROWS,
    Sharding,
    assign_documents,
    local_lengths,
    rows_received,
    saves_enough,
)
from megatron_v2pe.parallel.zigzag import range_indices, shard_ranges_of_ranks


def bounds(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cut(lengths, cp, *, mode="by_document", linear_tokens=16):
    return Sharding(mode=mode, linear_tokens=linear_tokens).shards(bounds(lengths), cp=cp)


def test_a_long_document_is_cut_and_short_ones_are_whole():
    shards = cut([16, 8, 8], 2)
    assert shards.holders == ((0, 1), (0,), (1,))
    assert shards.ranges[0].tolist() == [[0, 4], [12, 16], [16, 24]]
    assert shards.ranges[1].tolist() == [[4, 8], [8, 12], [24, 32]]
    assert shards.local_lengths(0) == (8, 8, 0)
    assert shards.local_lengths(1) == (8, 0, 8)
    assert shards.tokens(0) == shards.tokens(1) == 16


def test_a_document_lies_on_some_of_the_ranks():
    holders = assign_documents((96, 32, 32, 32), cp=4, linear_tokens=10**6)
    assert holders == ((0, 1), (2,), (3,), (2, 3))


@pytest.mark.parametrize("cp", [2, 3, 4, 6, 8])
def test_shards_are_a_partition_in_the_order_of_the_pack(cp):
    generator = np.random.default_rng(cp)
    for _ in range(40):
        lengths = (generator.integers(1, 40, size=generator.integers(1, 12)) * 2 * cp).tolist()
        shards = cut(lengths, cp, linear_tokens=int(generator.integers(1, 200)))
        held = [range_indices(ranges) for ranges in shards.ranges]
        assert sorted(np.concatenate(held).tolist()) == list(range(sum(lengths)))
        for rank, index in enumerate(held):
            assert (np.diff(index) > 0).all()
            assert len(index) == shards.tokens(rank) == sum(shards.local_lengths(rank)) > 0
            owners = np.searchsorted(bounds(lengths), index, side="right") - 1
            assert np.bincount(owners, minlength=len(lengths)).tolist() == list(shards.local_lengths(rank))


def test_a_rank_is_never_empty():
    shards = cut([24], 4)  # as zigzag: every rank holds a part
    assert min(map(shards.tokens, range(4))) == 6
    assert assign_documents((8, 8), cp=4, linear_tokens=1) is not None


def test_pieces_are_those_of_a_zigzag_over_the_ranks_that_hold_a_document():
    shards = cut([48], 4)
    assert shards.holders == ((0, 1, 2, 3),)
    for ranges, zigzag in zip(shards.ranges, shard_ranges_of_ranks(bounds([48]), cp=4), strict=True):
        assert ranges.tolist() == zigzag.tolist()


def test_received_rows_are_half_of_each_lower_and_all_of_each_higher_rank():
    lengths, holders = (24, 8), ((0, 1, 3), (2,))
    assert [rows_received(lengths, holders, rank) for rank in range(4)] == [16, 12, 0, 8]
    assert local_lengths(lengths, holders, 3) == (8, 0)


def test_auto_cuts_all_where_little_is_saved():
    one, many = [64], [16] * 8
    assert cut(one, 2, mode="auto").holders is None
    assert cut(many, 2, mode="auto").holders is not None
    assert cut(many, 2, mode="zigzag").holders is None
    assert cut(many, 1).holders is None


def test_auto_is_the_stated_share():
    part, whole = AUTO_ROWS
    lengths, holders = (64,), ((0, 1),)
    most = max(rows_received(lengths, holders, rank) for rank in range(2))
    assert saves_enough(lengths, holders, cp=2) == (whole * most * 2 <= part * sum(lengths))


def test_linear_tokens_change_what_is_even():
    lengths = (64, 16, 16, 16, 16)
    assert assign_documents(lengths, cp=2, linear_tokens=10**6) != assign_documents(
        lengths, cp=2, linear_tokens=1
    )


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="a document has 6 tokens, but context parallel size 2 needs a multiple"
    ):
        cut([8, 6], 2)


@pytest.mark.parametrize("cp", [4, 8, 16])
def test_ranks_are_even(cp):
    """Many documents of a mixture: cost and tokens of the fullest rank over the mean."""
    generator = np.random.default_rng(0)
    linear = 30720
    for _ in range(5):
        lengths = tuple((generator.integers(256, 32768, size=8 * cp) // (2 * cp) * 2 * cp).tolist())
        holders = assign_documents(lengths, cp=cp, linear_tokens=linear)
        cost, tokens = [0] * cp, [0] * cp
        for length, ranks in zip(lengths, holders, strict=True):
            for rank in ranks:
                cost[rank] += length * (length + linear) // len(ranks)
                tokens[rank] += length // len(ranks)
        assert max(cost) * cp < 1.04 * sum(cost)
        assert max(tokens) * cp < 1.10 * sum(tokens)
        received = sum(rows_received(lengths, holders, rank) for rank in range(cp))
        assert received < 0.05 * (cp - 1) * sum(lengths)
