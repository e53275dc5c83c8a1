"""Sharding over random packs and up to 64 ranks: nothing lost, nothing twice, the same causal work for all."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.parallel.zigzag import shard_indices, shard_ranges


@st.composite
def packs(draw):
    """A context parallel size and the boundaries of documents that split over it."""
    cp = draw(st.integers(1, 64))
    chunks = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    lengths = np.array(chunks) * (2 * cp if cp > 1 else 1)
    return cp, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def held_by_all(cu_seqlens, cp):
    return [shard_indices(cu_seqlens, cp=cp, cp_rank=rank) for rank in range(cp)]


@settings(max_examples=150, deadline=None)
@given(packs())
def test_every_token_is_held_once_in_equal_shares(pack):
    cp, cu_seqlens = pack
    held = held_by_all(cu_seqlens, cp)
    assert {len(indices) for indices in held} == {int(cu_seqlens[-1]) // cp}
    everything = np.concatenate(held)
    np.testing.assert_array_equal(np.sort(everything), np.arange(cu_seqlens[-1]))


@settings(max_examples=100, deadline=None)
@given(packs())
def test_gathered_shards_are_put_back_by_the_same_index(pack):
    cp, cu_seqlens = pack
    row = np.random.default_rng(0).integers(0, 1000, int(cu_seqlens[-1]))
    restored = np.full_like(row, -1)
    for indices in held_by_all(cu_seqlens, cp):
        restored[indices] = row[indices]
    np.testing.assert_array_equal(restored, row)


@settings(max_examples=100, deadline=None)
@given(packs())
def test_causal_work_is_the_same_on_every_rank_in_every_document(pack):
    cp, cu_seqlens = pack
    positions = np.concatenate([np.arange(length) for length in np.diff(cu_seqlens)])
    documents = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    work = [
        np.bincount(documents[indices], weights=positions[indices] + 1, minlength=len(cu_seqlens) - 1)
        for indices in held_by_all(cu_seqlens, cp)
    ]
    for other in work[1:]:
        np.testing.assert_array_equal(other, work[0])


@settings(max_examples=100, deadline=None)
@given(packs(), st.data())
def test_ranges_expand_to_the_indices_and_stay_inside_documents(pack, data):
    cp, cu_seqlens = pack
    rank = data.draw(st.integers(0, cp - 1))
    ranges = shard_ranges(cu_seqlens, cp=cp, cp_rank=rank)
    expanded = [np.arange(start, stop) for start, stop in ranges]
    np.testing.assert_array_equal(np.concatenate(expanded), shard_indices(cu_seqlens, cp=cp, cp_rank=rank))
    owners = np.repeat(np.arange(len(cu_seqlens) - 1), len(ranges) // (len(cu_seqlens) - 1))
    assert (ranges[:, 0] >= cu_seqlens[owners]).all()
    assert (ranges[:, 1] <= cu_seqlens[owners + 1]).all()
