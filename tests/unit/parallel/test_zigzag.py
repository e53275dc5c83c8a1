"""Sharding by eye: a few integers over all ranks."""

import numpy as np
import pytest

from megatron_v2pe.parallel.zigzag import contiguous_indices, shard_indices, shard_ranges

EIGHT_AND_FOUR = np.array([0, 8, 12])


def test_two_documents_over_two_ranks():
    assert shard_indices(EIGHT_AND_FOUR, cp=2, cp_rank=0).tolist() == [0, 1, 6, 7, 8, 11]
    assert shard_indices(EIGHT_AND_FOUR, cp=2, cp_rank=1).tolist() == [2, 3, 4, 5, 9, 10]


def test_one_document_of_sixteen_over_four_ranks():
    held = [shard_indices(np.array([0, 16]), cp=4, cp_rank=rank).tolist() for rank in range(4)]
    assert held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


def test_ranges_are_two_chunks_of_each_document():
    ranges = shard_ranges(EIGHT_AND_FOUR, cp=2, cp_rank=1)
    assert ranges.tolist() == [[2, 4], [4, 6], [9, 10], [10, 11]]
    assert ranges.dtype == np.int64


def test_one_rank_holds_whole_documents_of_any_length():
    assert shard_ranges(np.array([0, 5, 11]), cp=1, cp_rank=0).tolist() == [[0, 5], [5, 11]]
    assert shard_indices(np.array([0, 5, 11]), cp=1, cp_rank=0).tolist() == list(range(11))


def test_a_document_that_does_not_split_is_refused_by_name():
    with pytest.raises(ValueError, match="document 1 has 6 tokens, but context parallel size 2 needs a mult"):
        shard_ranges(np.array([0, 8, 14]), cp=2, cp_rank=0)


def test_contiguous_pieces():
    assert [contiguous_indices(12, cp=3, cp_rank=rank).tolist() for rank in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    with pytest.raises(ValueError, match="11 tokens do not split into 3"):
        contiguous_indices(11, cp=3, cp_rank=0)
