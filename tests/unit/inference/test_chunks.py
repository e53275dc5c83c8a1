"""Prefill chunks of tiny prompts, against loops over single tokens."""

import itertools

import numpy as np
import pytest

from megatron_v2pe.inference.chunks import Span, plan_chunks, rows_before, tile_edges
from megatron_v2pe.parallel.zigzag import shard_indices
from tests.support.packs import TOKENS_PER_TILE, sample

PROMPTS = {
    "text": [20],
    "image in the middle": [3, "3@1", 5],
    "image first": ["2@4", 7],
    "image last": [6, "2@2"],
    "two images without text between": [1, "1@1", "2@4"],
    "images only": ["5@1"],
}


def tile_of_tokens(layout):
    """Tile of each token, -1 for text, counted one by one."""
    tiles, number = np.full(layout.num_tokens, -1), 0
    for start, count in zip(layout.image_starts, layout.num_tiles, strict=True):
        for token in range(start, start + count * TOKENS_PER_TILE):
            tiles[token] = number + (token - start) // TOKENS_PER_TILE
        number += count
    return tiles


def test_the_example_of_the_docstring():
    chunks = plan_chunks(sample([3, "3@1", 5]), chunk_tokens=8)
    assert [(c.start, c.stop, c.first_tile, c.first_new, c.last_tile) for c in chunks] == [
        (0, 8, 0, 0, 2),
        (8, 16, 1, 2, 3),
        (16, 20, 3, 3, 3),
    ]
    assert [c.is_cut for c in chunks] == [True, False, False]
    assert [c.carried_by for c in chunks] == [None, 0, None]


@pytest.mark.parametrize("pieces", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(("cp", "tile_ranks"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3)])
def test_every_token_once_and_every_tile_encoded_once(pieces, cp, tile_ranks):
    layout = sample(pieces)
    tiles = tile_of_tokens(layout)
    for size, start in itertools.product((1, 3, 4, 5, 8, 100), (0, 1, 5)):
        chunks = plan_chunks(layout, chunk_tokens=size, cp=cp, tile_ranks=tile_ranks, start=start)
        tokens = [t for chunk in chunks for t in range(chunk.start, chunk.stop)]
        assert tokens == list(range(start, layout.num_tokens))
        encoded, carried = [], None
        for chunk in chunks:
            touched = sorted(set(tiles[chunk.start : chunk.stop].tolist()) - {-1})
            assert touched == list(range(chunk.first_tile, chunk.last_tile))
            assert chunk.carried_by == carried
            shares = [range(*chunk.tiles_of(rank, tile_ranks)) for rank in range(tile_ranks)]
            new = sorted(tile for share in shares for tile in share)
            assert new == list(range(chunk.first_new, chunk.last_tile))
            counts = [len(share) for share in shares]
            assert max(counts) - min(counts) <= 1
            for tile in new:
                assert tile in shares[chunk.owner_of(tile, tile_ranks)]
            encoded += new
            carried = chunk.owner_of(chunk.last_tile - 1, tile_ranks) if chunk.is_cut else None
        assert encoded == sorted({tile for tile in tiles[start:].tolist() if tile >= 0})
        assert all(chunk.padded % (2 * cp if cp > 1 else 1) == 0 for chunk in chunks)
        assert all(chunk.padded == chunk.num_tokens for chunk in chunks[:-1])


def test_shares_are_even_over_many_small_chunks():
    chunks = plan_chunks(sample([2, "12@1", 2]), chunk_tokens=TOKENS_PER_TILE, tile_ranks=4)
    counts = [sum(len(range(*chunk.tiles_of(rank, 4))) for chunk in chunks) for rank in range(4)]
    assert counts == [3, 3, 3, 3]


def test_tile_edges():
    starts, ends = tile_edges(sample([3, "2@1", 1, "1@1"]))
    assert starts.tolist() == [3, 7, 12]
    assert ends.tolist() == [7, 11, 16]


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_rows_of_a_prefix_are_the_first_rows_of_each_rank(cp):
    """Two chunks, five decoded tokens and a further chunk, counted token by token."""
    width = 2 * cp if cp > 1 else 1
    spans = [
        Span(start=0, stop=2 * width, padded=2 * width),
        Span(start=2 * width, stop=2 * width + 1, padded=width),
        Span(start=2 * width + 1, stop=2 * width + 6),
        Span(start=2 * width + 6, stop=2 * width + 9, padded=-(-3 // width) * width),
    ]
    for rank in range(cp):
        held = []
        for span in spans:
            if span.padded:
                index = shard_indices(np.array([0, span.padded]), cp=cp, cp_rank=rank) + span.start
                held += [token for token in index.tolist() if token < span.stop]
            else:
                held += [token for token in range(span.start, span.stop) if token % cp == rank]
        assert held == sorted(held)
        for end in range(spans[-1].stop + 2):
            wanted = sum(token < end for token in held)
            assert rows_before(spans, end, cp=cp, rank=rank) == wanted


def test_bad_numbers():
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        plan_chunks(sample([3]), chunk_tokens=0)
    with pytest.raises(ValueError, match="token 3 of 3"):
        plan_chunks(sample([3]), chunk_tokens=1, start=3)
