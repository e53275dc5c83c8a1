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

import torch
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device

Rows = slice | Tensor
SHORT_TOKENS = 512  # longer documents keep a kernel busy on their own, and would have to be copied


@dataclass(frozen=True, eq=False)
class BlockBatch:
    """Equal blocks of one or several documents that a kernel computes in one call.

    Attributes:
        queries: local rows of the queries; a slice where they are consecutive, else an index.
        keys: rows of the source's keys, likewise.
        blocks: number of documents.
        causal: the diagonal block, of queries and keys of the same tokens.
    """

    queries: Rows
    keys: Rows
    blocks: int
    causal: bool

    @property
    def num_keys(self) -> int:
        """Rows of `keys`."""
        return self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)


@lru_cache(maxsize=256)  # the same for all layers of a micro batch, forward and backward
def block_batches(
    lengths: tuple[int, ...], *, rank: int, source: int, device: torch.device
) -> tuple[BlockBatch, ...]:
    """Blocks that `rank` computes with the keys of rank `source`.

    Short documents of equal length share a call, which matters on packs of many of them: 64 documents of 32
    tokens need 6 ms one by one and 1.3 ms together.

    Args:
        lengths: tokens of each document on one rank (equal on all ranks), both zigzag chunks together.
        rank: rank of the queries.
        source: rank that the keys belong to.
        device: where indices are needed.

    Example:
        One document of 4 local tokens: with its own keys [0:4] x [0:4] causal; with a lower rank's
        [0:4] x [0:2]; with a higher rank's [2:4] x [0:4].
    """
    by_length: dict[int, list[int]] = {}
    for length, stop in zip(lengths, accumulate(lengths), strict=True):
        if length:
            by_length.setdefault(length, []).append(stop - length)
    batches = []
    for length, starts in by_length.items():
        half = length // 2
        queries = (half, length) if source > rank else (0, length)
        keys = (0, half) if source < rank else (0, length)
        together = [starts] if length <= SHORT_TOKENS else [[start] for start in starts]
        for group in together:
            rows = _rows(group, *queries, device), _rows(group, *keys, device)
            batches.append(BlockBatch(*rows, blocks=len(group), causal=source == rank))
    return tuple(batches)


def num_key_rows(batches: Sequence[BlockBatch]) -> int:
    """Rows of keys that the blocks read, and of gradients that they return."""
    return sum(batch.num_keys for batch in batches)


def _rows(starts: list[int], low: int, high: int, device: torch.device) -> Rows:
    """Tokens low..high-1 of the documents that start at `starts`."""
    if len(starts) == 1:
        return slice(starts[0] + low, starts[0] + high)
    if low == 0 and all(following - start == high for start, following in pairwise(starts)):
        return slice(starts[0], starts[-1] + high)  # whole documents, one directly after the other
    rows = (torch.tensor(starts).unsqueeze(1) + torch.arange(low, high)).flatten()
    return to_device([rows.numpy()], device)[0]
