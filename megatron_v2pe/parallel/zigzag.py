"""Which tokens a context parallel rank holds: pure integers, no process group.

Causal attention makes late tokens dearer than early ones. Each document is therefore cut into 2*cp equal zigzag
chunks, and rank r holds zigzag chunks r and 2*cp-1-r, one cheap and one dear, so that all ranks do the same work:

    document of 8 tokens, cp 2        rank 0: 0 1 . . . . 6 7        rank 1: . . 2 3 4 5 . .

Documents are cut one by one. Cutting the pack as one row instead (as the release does) would balance the row, but
leave a rank with parts of documents that attention kernels then treat as whole ones.

The same index cuts tokens, labels, weights, positions and image slots; everything about a shard follows from
`shard_ranges`, which has two rows for each document whatever its length.
"""

from __future__ import annotations

import numpy as np

from megatron_v2pe.v2pe.layout import Int64Array


def shard_ranges(cu_seqlens: Int64Array, *, cp: int, cp_rank: int) -> Int64Array:
    """Token ranges of the pack that a rank holds, in the order in which it holds them.

    Args:
        cu_seqlens: int64 [N+1], boundaries of the padded documents.
        cp: ranks that share the pack.
        cp_rank: 0..cp-1.

    Returns:
        int64 [2N, 2], half-open ranges, two zigzag chunks for each document; [N, 2] whole documents for cp 1.

    Raises:
        ValueError: a document's padded length is not a multiple of 2 * cp.

    Example:
        cu_seqlens [0, 8, 12], cp 2, cp_rank 1: [[2, 4], [4, 6], [9, 10], [10, 11]].
    """
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    if cp == 1:
        return np.stack([starts, cu_seqlens[1:]], axis=1)
    chunk_lengths, rest = np.divmod(lengths, 2 * cp)
    if rest.any():
        document = int(np.flatnonzero(rest)[0])
        raise ValueError(
            f"document {document} has {lengths[document]} tokens, but context parallel size {cp} needs a "
            f"multiple of {2 * cp}; pad documents to ParallelPlan.pad_to_multiple"
        )
    early = starts + cp_rank * chunk_lengths
    late = starts + (2 * cp - 1 - cp_rank) * chunk_lengths
    firsts = np.stack([early, late], axis=1)  # [N, 2 zigzag chunks]
    return np.stack([firsts, firsts + chunk_lengths[:, None]], axis=2).reshape(-1, 2)  # [N, 2, 2] -> [2N, 2]


def shard_ranges_of_ranks(cu_seqlens: Int64Array, *, cp: int) -> list[Int64Array]:
    """`shard_ranges` of every context parallel rank."""
    return [shard_ranges(cu_seqlens, cp=cp, cp_rank=rank) for rank in range(cp)]


def range_indices(ranges: Int64Array) -> Int64Array:
    """The tokens of half-open ranges [R, 2], one range after the other, int64 [tokens].

    Example:
        [[0, 2], [6, 8]]: [0, 1, 6, 7].
    """
    lengths = ranges[:, 1] - ranges[:, 0]
    # Each range counts up from its start: a running index, shifted at the first token of each range.
    shifts = ranges[:, 0] - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(shifts, lengths)


def shard_indices(cu_seqlens: Int64Array, *, cp: int, cp_rank: int) -> Int64Array:
    """Index into the pack of each token that a rank holds, int64 [t / cp]. See `shard_ranges`.

    Example:
        cu_seqlens [0, 8, 12], cp 2, cp_rank 0: [0, 1, 6, 7, 8, 11].
    """
    return range_indices(shard_ranges(cu_seqlens, cp=cp, cp_rank=cp_rank))


def contiguous_indices(num_tokens: int, *, cp: int, cp_rank: int) -> Int64Array:
    """The cp_rank-th of cp equal slices of a row, the layout of head-parallel (Ulysses) attention.

    Raises:
        ValueError: the row does not split evenly.
    """
    length, rest = divmod(num_tokens, cp)
    if rest:
        raise ValueError(f"{num_tokens} tokens do not split into {cp} equal slices")
    return np.arange(cp_rank * length, (cp_rank + 1) * length, dtype=np.int64)
