"""Which blocks of queries and keys a context parallel rank computes: geometry of the zigzag, no communication.

Every document is cut into 2*cp zigzag chunks, and a rank holds an early and a late one (see `zigzag`). With the keys of

    itself           each document is causal in itself: its early zigzag chunk before its late one
    a lower rank     all queries see the early zigzag chunk of its keys
    a higher rank    the late queries see both zigzag chunks of its keys

The other combinations lie in the future and are never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.parallel.zigzag import range_indices

Rows = slice | Tensor
SHORT_TOKENS = 512  # longer documents keep a kernel busy on their own, and would have to be copied
WINDOW_ROWS = 8192  # queries of a window's tiles in one call: bounds the copies of keys for grouped heads


@dataclass(frozen=True, eq=False)
class BlockBatch:
    """Equal blocks of one or several documents that a kernel computes in one call.

    Attributes:
        queries: local rows of the queries; a slice where they are consecutive, else an index.
        keys: rows of the source's keys, likewise.
        blocks: number of documents, or of tiles of a window.
        causal: query i of a block sees its keys 0..i.
        first: no earlier block has these queries, and they are my own keys too: results are written, not added. True
            of diagonal blocks, of queries and keys of the same tokens.
    """

    queries: Rows
    keys: Rows
    blocks: int
    causal: bool
    first: bool

    @property
    def num_keys(self) -> int:
        """Rows of `keys`."""
        return self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)


@dataclass(frozen=True)
class Block:
    """Half-open rows of the queries and of the source's keys that see each other."""

    queries: tuple[int, int]
    keys: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]


def batched(
    blocks: Sequence[Block],
    *,
    causal: bool,
    first: bool,
    device: torch.device,
    backwards: bool = False,
    most_rows: int | None = None,
) -> tuple[BlockBatch, ...]:
    """Short blocks of the same shape put together, in the order of each shape's first.

    Args:
        blocks: of different documents, or different tiles.
        causal: see `BlockBatch`.
        first: see `BlockBatch`.
        device: where indices are needed.
        backwards: the last row of each block comes first, of queries and of keys.
        most_rows: of queries in a batch of several blocks; None for any number.
    """
    by_shape: dict[tuple[int, int], list[Block]] = {}
    for block in blocks:
        by_shape.setdefault(block.shape, []).append(block)
    batches = []
    for shape, alike in by_shape.items():
        size = len(alike) if most_rows is None else max(1, most_rows // shape[0])
        if max(shape) > SHORT_TOKENS:
            size = 1
        for start in range(0, len(alike), size):
            group = alike[start : start + size]
            queries = _rows([block.queries for block in group], device, backwards)
            keys = _rows([block.keys for block in group], device, backwards)
            batches.append(BlockBatch(queries, keys, blocks=len(group), causal=causal, first=first))
    return tuple(batches)


@lru_cache(maxsize=256)  # the same for all layers of a micro batch, forward and backward
def block_batches(
    lengths: tuple[int, ...], *, rank: int, source: int, device: torch.device, early_alone: bool = False
) -> tuple[BlockBatch, ...]:
    """Blocks that `rank` computes with the keys of rank `source`.

    Short documents of equal length share a call, which matters on packs of many of them: 64 documents of 32
    tokens need 6 ms one by one and 1.3 ms together.

    Args:
        lengths: tokens of each document on one rank (equal on all ranks), both zigzag chunks together.
        rank: rank of the queries.
        source: rank that the keys belong to.
        device: where indices are needed.
        early_alone: of a lower rank only `early_rows` are at hand, one after the other.

    Example:
        One document of 4 local tokens: with its own keys [0:4] x [0:4] causal; with a lower rank's
        [0:4] x [0:2]; with a higher rank's [2:4] x [0:4].
    """
    blocks = []
    for length, stop in zip(lengths, accumulate(lengths), strict=True):
        start, half = stop - length, length // 2
        early = start // 2 if early_alone else start
        if length:
            queries = (start + half, stop) if source > rank else (start, stop)
            blocks.append(Block(queries, (early, early + half) if source < rank else (start, stop)))
    return batched(blocks, causal=source == rank, first=source == rank, device=device)


@lru_cache(maxsize=64)  # the same for all layers of a micro batch, forward and backward
def early_rows(lengths: tuple[int, ...], *, device: torch.device) -> Rows:
    """Rows of the documents' early zigzag chunks: all that higher ranks see of a rank's keys.

    Args:
        lengths: as in `block_batches`.
        device: where an index is needed.
    """
    if len(lengths) == 1:
        return slice(0, lengths[0] // 2)
    stops = np.cumsum(lengths, dtype=np.int64)
    starts = stops - lengths
    return to_device([range_indices(np.column_stack([starts, (starts + stops) // 2]))], device)[0]


def num_key_rows(batches: Sequence[BlockBatch]) -> int:
    """Rows of keys that the blocks read, and of gradients that they return."""
    return sum(batch.num_keys for batch in batches)


def _rows(ranges: list[tuple[int, int]], device: torch.device, backwards: bool) -> Rows:
    """Rows of ranges that are equally long, one after the other."""
    first, stop = ranges[0]
    if not backwards and all(after[0] == before[1] for before, after in pairwise(ranges)):
        return slice(first, ranges[-1][1])  # one directly after the other
    starts = torch.tensor([start for start, _ in ranges])
    within = torch.arange(stop - first)
    rows = (starts.unsqueeze(1) + (within.flip(0) if backwards else within)).flatten()
    return to_device([rows.numpy()], device)[0]
