"""Where a prompt is cut for prefill, which tiles each prefill chunk encodes, and who keeps its tokens: integers only.

    tokens    0 ........ 7 | 8 ....... 15 | 16 .. 19      chunk_tokens 8
    tiles         [ 0 ][ 1 | ][ 2 ]                       tile 1 is cut: encoded in chunk 0, its last rows are
                                                          carried to chunk 1 by the rank that encoded it

Every prefill chunk is padded to a multiple of 2*cp (only the last one ever needs it) and cut over context parallel
ranks by the zigzag of training, so that each rank holds as many tokens of every chunk. A rank's rows are in the order
of the tokens, within a chunk and over chunks: the first n tokens of a prompt are always its first `rows_before(n)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.parallel.zigzag import range_indices, shard_ranges
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout

MICRO_BATCH_TILES = 16  # encoded at a time: bounds the tower's memory whatever the chunk is
DEFAULT_CHUNK_TOKENS = 8192  # chunks of 1K and more cost what one pass costs; their memory grows


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """One piece of a prompt, and the tiles it touches. Tiles are numbered over the prompt.

    Attributes:
        start: first token.
        stop: one past the last token.
        padded: tokens of the chunk with padding at its end.
        first_tile: first tile with a token in the chunk.
        first_new: first tile that no earlier chunk has encoded; `first_tile`, or one more where a tile was cut.
        last_tile: one past the last tile with a token in the chunk; tiles first_new..last_tile-1 are encoded here.
        rotation: rank that encodes the first new tile; the others follow, so that shares are even over chunks.
        carried_by: rank that holds the features of the cut tile `first_tile`; None where no tile was cut.
        is_cut: the last tile has tokens in the next chunk; its encoder keeps its features.
    """

    start: int
    stop: int
    padded: int
    first_tile: int
    first_new: int
    last_tile: int
    rotation: int
    carried_by: int | None
    is_cut: bool

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.stop - self.start

    def tiles_of(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """Half-open range of new tiles that a rank of the tile group encodes; counts differ by at most one."""
        share, rest = divmod(self.last_tile - self.first_new, num_ranks)
        place = (rank - self.rotation) % num_ranks
        first = self.first_new + place * share + min(place, rest)
        return first, first + share + (place < rest)

    def owner_of(self, tile: int, num_ranks: int) -> int:
        """Rank of the tile group that holds the features of a tile of this chunk."""
        if tile < self.first_new:
            assert self.carried_by is not None
            return self.carried_by
        for rank in range(num_ranks):
            first, last = self.tiles_of(rank, num_ranks)
            if first <= tile < last:
                return rank
        raise ValueError(f"tile {tile} is not in the chunk {self}")


def plan_chunks(
    layout: SampleLayout, *, chunk_tokens: int, cp: int = 1, tile_ranks: int = 1, start: int = 0
) -> list[PrefillChunk]:
    """Cut tokens start..num_tokens-1 of a prompt; cuts may fall inside an image.

    Args:
        layout: of the prompt.
        chunk_tokens: longest chunk; rounded down to a multiple of 2*cp, but at least 2*cp.
        cp: context parallel ranks.
        tile_ranks: ranks that share the tiles.
        start: tokens before it are in the cache already. A tile that `start` cuts is encoded again.

    Raises:
        ValueError: `chunk_tokens` is below 1, or nothing is left to prefill.

    Example:
        20 tokens, an image of 3 tiles of 4 tokens at 3, chunks of 8, cp 1: (0, 8) tiles 0..1, (8, 16) tiles
        1..2 of which 1 is carried, (16, 20) no tiles.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, but must be at least 1")
    if not 0 <= start < layout.num_tokens:
        raise ValueError(f"prefill starts at token {start} of {layout.num_tokens}")
    multiple = 2 * cp if cp > 1 else 1
    size = max(multiple, chunk_tokens // multiple * multiple)
    starts, ends = tile_edges(layout)
    chunks: list[PrefillChunk] = []
    encoded, cut_owner = 0, None
    for low in range(start, layout.num_tokens, size):
        high = min(low + size, layout.num_tokens)
        first = int(np.searchsorted(ends, low, side="right"))
        last = max(first, int(np.searchsorted(starts, high, side="left")))
        first_new = first if cut_owner is None else first + 1
        chunk = PrefillChunk(
            start=low,
            stop=high,
            padded=-(-(high - low) // multiple) * multiple,
            first_tile=first,
            first_new=first_new,
            last_tile=last,
            rotation=encoded % tile_ranks,
            carried_by=cut_owner,
            is_cut=last > first and int(ends[last - 1]) > high,
        )
        chunks.append(chunk)
        encoded += last - first_new
        cut_owner = chunk.owner_of(last - 1, tile_ranks) if chunk.is_cut else None
    return chunks


def tile_edges(layout: SampleLayout) -> tuple[np.ndarray, np.ndarray]:
    """First token and one past the last token of each tile of a prompt, int64 [n] each, ascending."""
    per_tile = layout.tokens_per_tile
    counts = layout.num_tiles
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(layout.image_starts, counts) + within * per_tile
    return starts, starts + per_tile


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens start..stop-1 that entered the cache together.

    Attributes:
        start: first token.
        stop: one past the last.
        padded: tokens of the zigzag cut; 0 for decoded tokens, of which rank i keeps those with index % cp == i.
    """

    start: int
    stop: int
    padded: int = 0

    def rows_before(self, end: int, *, cp: int, rank: int) -> int:
        """Tokens start..end-1 of the span that a rank holds.

        Example: tokens 0..9 padded to 12 over cp 2 are [0 1 2 | 9] on rank 0 and [3 4 5 | 6 7 8] on rank 1; of
        the first 8 they hold 3 and 5.
        """
        end = min(end, self.stop)
        if end <= self.start:
            return 0
        if self.padded == 0:
            return (end - rank + cp - 1) // cp - (self.start - rank + cp - 1) // cp
        if cp == 1:
            return end - self.start
        width = self.padded // (2 * cp)
        length = end - self.start
        early, late = rank * width, (2 * cp - 1 - rank) * width
        return sum(min(max(length - first, 0), width) for first in (early, late))


def rows_before(spans: Sequence[Span], end: int, *, cp: int, rank: int) -> int:
    """Rows that a rank holds of the first `end` tokens of a document."""
    return sum(span.rows_before(end, cp=cp, rank=rank) for span in spans)


def tokens_held(spans: Sequence[Span], first: int, stop: int, *, cp: int, rank: int) -> Int64Array:
    """Which of the tokens first..stop-1 of a document a rank holds, in the order of its rows, which is rising.

    Example: tokens 0..9 padded to 12 over cp 2 are [0 1 2 | 9] on rank 0; of 2..9 it holds 2 and 9.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for span in spans:
        low, high = max(first, span.start), min(stop, span.stop)
        if low >= high:
            continue
        if span.padded:
            cut = shard_ranges(np.array([0, span.padded], dtype=np.int64), cp=cp, cp_rank=rank) + span.start
            found.append(range_indices(cut.clip(low, high)))
        else:
            index = np.arange(low, high, dtype=np.int64)
            found.append(index[index % cp == rank])
    return np.concatenate(found)
