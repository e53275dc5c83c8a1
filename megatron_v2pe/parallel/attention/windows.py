"""Which blocks sliding windows consist of: geometry, no communication.

Query i of a document sees its w newest keys, i-w+1..i. A rank's consecutive queries are cut into tiles of w:

    keys of the tile itself        causal: query a of the tile sees keys 0..a
    keys of the w-1 rows before    query a sees keys a..w-2: causal as well, with queries and keys in reversed order

so that kernels need no mask, and what lies outside the window is never computed. Before a rank's first tile come up to
w-1 rows of its document that other ranks may hold, the halo (see `transports.halo`). Where fewer than w-1 rows come
before a tile, because the document starts there, or a tile has fewer than w-1 queries, a rectangle is left beside the
triangle.

Shape legend: w window, m queries of a tile, n rows before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.block_batches import WINDOW_ROWS, Block, BlockBatch, batched

_batched = partial(batched, most_rows=WINDOW_ROWS)


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Newest tokens that a query of a layer sees, itself included; None for all.

    Args:
        config: mcore's configuration (window_size, window_attn_skip_freq).
        layer_number: 1-based.

    Raises:
        ConfigError: the window also looks ahead.
    """
    size = config.window_size
    if size is None or not is_layer_window_attention(size, config.window_attn_skip_freq, layer_number):
        return None
    before, after = size
    if before < 0 or after != 0:
        raise ConfigError(
            f"window_size is {tuple(size)}, but a decoder's window is (w - 1, 0), the w newest tokens, w at least 1"
        )
    return int(before) + 1


@dataclass(frozen=True)
class QueryRange:
    """Consecutive tokens of one document on a rank, all of which are queries.

    Attributes:
        start: first local row.
        length: rows.
        halo_start: first row of what comes before it, among the rows of the halo.
        halo: rows of the halo that come before it, at most w - 1; fewer where the document starts there.
    """

    start: int
    length: int
    halo_start: int = 0
    halo: int = 0


@dataclass
class _Shapes:
    """Blocks by the way in which a kernel computes them."""

    rectangles: list[Block]
    triangles: list[Block]

    def add(self, queries: tuple[int, int], keys: tuple[int, int], window: int) -> None:
        """A tile's queries, at most w, with the n <= w - 1 rows before it: query a sees keys from a - (w - 1 - n)."""
        (first, stop), (low, high) = queries, keys
        slack = window - 1 - (high - low)  # so many queries more see all these keys
        start = min(first + slack, stop)
        sides = min(stop - start, high - low)
        self._add_rectangle((first, start), keys)
        if sides:
            self.triangles.append(Block((start, start + sides), (low, low + sides)))
            self._add_rectangle((start, start + sides), (low + sides, high))

    def _add_rectangle(self, queries: tuple[int, int], keys: tuple[int, int]) -> None:
        block = Block(queries, keys)
        if all(block.shape):
            self.rectangles.append(block)

    def batches(self, device: torch.device) -> tuple[BlockBatch, ...]:
        """What kernels are given."""
        return _batched(self.rectangles, causal=False, first=False, device=device) + _batched(
            self.triangles, causal=True, first=False, device=device, backwards=True
        )


def whole_documents(lengths: Iterable[int]) -> tuple[QueryRange, ...]:
    """Documents that a rank holds whole."""
    sizes = tuple(lengths)
    starts = accumulate(sizes, initial=0)
    return tuple(QueryRange(start, length) for start, length in zip(starts, sizes, strict=False) if length)


def own_blocks(ranges: Sequence[QueryRange], *, window: int, device: torch.device) -> tuple[BlockBatch, ...]:
    """Blocks of queries with keys of the same rows.

    Args:
        ranges: of this rank.
        window: keys that a query sees, itself included.
        device: where indices are needed.

    Example:
        A document of 5 tokens, window 3: causal [0:3] x [0:3] and [3:5] x [3:5], first of their queries; then backwards
        [3:5] x [1:3].
    """
    diagonal, before = [], _Shapes([], [])
    for each in ranges:
        for tile in _tiles(each, window):
            diagonal.append(Block(tile, tile))
            if tile[0] > each.start:
                before.add(tile, (tile[0] - window + 1, tile[0]), window)
    return _batched(diagonal, causal=True, first=True, device=device) + before.batches(device)


def halo_blocks(ranges: Sequence[QueryRange], *, window: int, device: torch.device) -> tuple[BlockBatch, ...]:
    """Blocks of queries with keys of the halo, none of which is first; arguments as of `own_blocks`."""
    before = _Shapes([], [])
    for each in ranges:
        queries = (each.start, each.start + min(each.length, window))
        before.add(queries, (each.halo_start, each.halo_start + each.halo), window)
    return before.batches(device)


def _tiles(each: QueryRange, window: int) -> Iterator[tuple[int, int]]:
    stop = each.start + each.length
    for first in range(each.start, stop, window):
        yield first, min(first + window, stop)
