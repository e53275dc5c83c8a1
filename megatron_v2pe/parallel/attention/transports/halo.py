"""Sliding windows over ranks: a rank gets the w-1 keys before each of its ranges, from whoever holds them.

    document of 16 tokens, cp 2, w 3     rank 0: [ 0 .. 3 ]            [ 12 .. 15 ]      halo: 10 11
                                         rank 1:          [ 4 .. 11 ]                    halo: 2 3

One exchange for each layer and direction, whatever `parallel.cp_comm_type` and `parallel.cp_sharding` are, in flight
while a rank computes with its own keys; gradients return in another. Keys that a range's halo shares with the rank's
own rows are sent to itself, so that the halo of a range is always consecutive.

Rows received by a rank: at most (w - 1) for each of its ranges, two a document, however long documents are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.parallel.attention.block_batches import BlockBatch
from megatron_v2pe.parallel.attention.blockwise import Lengths
from megatron_v2pe.parallel.attention.transports.direct import Places
from megatron_v2pe.parallel.attention.windows import QueryRange, halo_blocks, own_blocks
from megatron_v2pe.parallel.shards import held_by
from megatron_v2pe.parallel.zigzag import range_indices, shard_ranges_of_ranks
from megatron_v2pe.v2pe.layout import Int64Array

HALO = -1
"""The source of keys that `iter_kv` gives the halo."""


@dataclass(frozen=True)
class RankTokens:
    """Tokens of a rank, in the order of its rows; token i of one document is never that of another.

    Attributes:
        held: int64 [R, 2], half-open ranges of tokens of whose keys it has rows.
        queries: int64 [Q, 3], ranges of its queries, the last of `held`, and where the document of each starts.
    """

    held: Int64Array
    queries: Int64Array

    def halo(self, window: int) -> Int64Array:
        """Ranges of tokens that its queries see before their own range, int64 [Q, 2]; some are empty."""
        first = np.maximum(self.queries[:, 2], self.queries[:, 0] - (window - 1))
        return np.stack([first, self.queries[:, 0]], axis=1)


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """What a rank sends, receives and computes.

    Attributes:
        window: keys that a query sees, itself included.
        ranges: of its queries.
        device: where indices are needed.
        sent: rows that it sends, receiver by receiver, int64 [S].
        sent_counts: of each receiver.
        received_counts: of each sender.
        order: row of the halo of each received one, int64 [H].
        is_needed: whether any rank needs a halo.
    """

    window: int
    ranges: tuple[QueryRange, ...]
    device: torch.device
    sent: Int64Array
    sent_counts: list[int]
    received_counts: list[int]
    order: Tensor
    is_needed: bool

    @cached_property
    def own(self) -> tuple[BlockBatch, ...]:
        """Blocks with keys of the rank's own ranges."""
        return own_blocks(self.ranges, window=self.window, device=self.device)

    @cached_property
    def before(self) -> tuple[BlockBatch, ...]:
        """Blocks with keys of the halo."""
        return halo_blocks(self.ranges, window=self.window, device=self.device)

    @cached_property
    def sent_rows(self) -> Tensor:
        """`sent` on the device."""
        return to_device([self.sent], self.device)[0]

    @cached_property
    def sums(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(rows, places among what is sent) of additions that have each row once: sums do not depend on timing."""
        order = np.argsort(self.sent, kind="stable")
        rows = self.sent[order]
        is_new = np.concatenate([[True], rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, dtype=bool)
        starts = np.flatnonzero(is_new)
        turn = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
        found = []
        for each in range(int(turn.max(initial=-1)) + 1):
            pair = to_device([rows[turn == each], order[turn == each]], self.device)
            found.append((pair[0], pair[1]))
        return tuple(found)


def plan_halo(tokens: Sequence[RankTokens], *, rank: int, window: int, device: torch.device) -> HaloPlan:
    """Find who sends what; the same on all ranks, each for itself.

    Args:
        tokens: of every rank.
        rank: this one.
        window: keys that a query sees, itself included.
        device: where indices are needed.
    """
    holders = _Holders(tokens)
    asked = [range_indices(each.halo(window)) for each in tokens]
    owners, _ = holders.find(asked[rank])
    sent = []
    for wanted in asked:
        owner, row = holders.find(wanted)
        sent.append(row[owner == rank])
    order = np.argsort(owners, kind="stable")
    return HaloPlan(
        window=window,
        ranges=_query_ranges(tokens[rank], window),
        device=device,
        sent=np.concatenate(sent),
        sent_counts=[len(rows) for rows in sent],
        received_counts=np.bincount(owners, minlength=len(tokens)).tolist(),
        order=to_device([order], device)[0],
        is_needed=any(len(wanted) for wanted in asked),
    )


class _Holders:
    """Which rank has which row of a token's keys."""

    def __init__(self, tokens: Sequence[RankTokens]) -> None:
        lengths = [each.held[:, 1] - each.held[:, 0] for each in tokens]
        starts = np.concatenate([each.held[:, 0] for each in tokens])
        ranks = np.repeat(np.arange(len(tokens)), [len(each) for each in lengths])
        rows = np.concatenate([np.cumsum(each) - each for each in lengths])
        filled = np.flatnonzero(np.concatenate(lengths))
        order = filled[np.argsort(starts[filled], kind="stable")]
        self.starts, self.ranks, self.rows = starts[order], ranks[order], rows[order]

    def find(self, wanted: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Rank and row of each token."""
        place = np.searchsorted(self.starts, wanted, side="right") - 1
        return self.ranks[place], self.rows[place] + wanted - self.starts[place]


def _query_ranges(tokens: RankTokens, window: int) -> tuple[QueryRange, ...]:
    halo = tokens.halo(window)
    sizes = (halo[:, 1] - halo[:, 0]).tolist()
    lengths = (tokens.queries[:, 1] - tokens.queries[:, 0]).tolist()
    found, row, before = [], 0, 0
    for length, size in zip(lengths, sizes, strict=True):
        found.append(QueryRange(row, length, before, size))
        row, before = row + length, before + size
    return tuple(found)


def tokens_of_shards(cu_seqlens: Int64Array, ranges: Sequence[Int64Array]) -> list[RankTokens]:
    """Of packs in training: all that a rank holds are queries too."""
    found = []
    for each in ranges:
        document = np.searchsorted(cu_seqlens, each[:, 0], side="right") - 1
        found.append(RankTokens(each, np.column_stack([each, cu_seqlens[document]])))
    return found


@lru_cache(maxsize=32)  # the same for all windowed layers of a micro batch, forward and backward
def zigzag_halo(lengths: Lengths, *, cp: int, rank: int, window: int, device: torch.device) -> HaloPlan:
    """For documents of so many local tokens, cut over all ranks."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * cp])
    tokens = tokens_of_shards(cu_seqlens, shard_ranges_of_ranks(cu_seqlens, cp=cp))
    return plan_halo(tokens, rank=rank, window=window, device=device)


@lru_cache(maxsize=32)
def document_halo(places: Places, *, cp: int, rank: int, window: int, device: torch.device) -> HaloPlan:
    """For documents that lie on some of the ranks."""
    cu_seqlens = np.concatenate([[0], np.cumsum(places.lengths, dtype=np.int64)])
    tokens = tokens_of_shards(cu_seqlens, held_by(cu_seqlens, places.holders, cp=cp).ranges)
    return plan_halo(tokens, rank=rank, window=window, device=device)


class Halo:
    """A `KVTransport` that brings the keys which windows reach before a rank's ranges.

    Args:
        plan: of this rank.
        group: context parallel ranks; None on one rank.
        past: [2, n, k, d], keys and values of earlier tokens, the first of the rows that the plan counts.
    """

    def __init__(self, plan: HaloPlan, group: dist.ProcessGroup | None, past: Tensor | None = None) -> None:
        self.plan = plan
        self.group = group
        self.past = past
        self.rank: int = 0 if group is None else group.rank()
        self.brings = plan.is_needed

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """See `KVTransport`."""
        return self.plan.before if source == HALO else self.plan.own

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My keys first, while the halo is in flight."""
        if not self.brings:
            yield self.rank, key, value
            return
        mine = torch.stack([key, value], dim=1)  # [l, 2, k, d]
        if self.past is not None:
            mine = torch.cat([self.past.transpose(0, 1), mine])
        send = mine[self.plan.sent_rows]
        received = send.new_empty(sum(self.plan.received_counts), *send.shape[1:])
        work = self.exchange(received, send, self.plan.received_counts, self.plan.sent_counts)
        yield self.rank, key, value
        if work is not None:
            work.wait()
        halo = torch.empty_like(received)
        halo[self.plan.order] = received
        yield HALO, halo[:, 0], halo[:, 1]

    def grad_return(self, lengths: Lengths, like: Tensor) -> _HaloGradReturn:
        """See `KVTransport`."""
        return _HaloGradReturn(self, like.dtype)

    def exchange(
        self, received: Tensor, send: Tensor, receive_counts: list[int], send_counts: list[int]
    ) -> dist.Work | None:
        """Start an exchange of rows; None where there is nobody to exchange with."""
        if self.group is None:
            received.copy_(send)
            return None
        return dist.all_to_all_single(
            received, send, receive_counts, send_counts, group=self.group, async_op=True
        )


class _HaloGradReturn:
    """A `GradReturn` of one exchange, the other way round."""

    def __init__(self, halo: Halo, dtype: torch.dtype) -> None:
        self._halo = halo
        self._dtype = dtype
        self._send: Tensor | None = None
        self._received: Tensor | None = None
        self._work: dist.Work | None = None

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """See `GradReturn`; a key may be in two of the blocks."""
        plan = self._halo.plan
        total = d_own.new_zeros(2, len(plan.order), *d_own.shape[2:])
        for batch, block in zip(plan.before, blocks, strict=True):
            total[:, batch.keys] += block
        self._send = send = total.transpose(0, 1)[plan.order].to(self._dtype)  # [H, 2, k, d]
        self._received = send.new_empty(len(plan.sent), *send.shape[1:])
        self._work = self._halo.exchange(self._received, send, plan.sent_counts, plan.received_counts)

    def finish(self, d_own: Tensor) -> None:
        """See `GradReturn`."""
        if self._received is None:
            return
        if self._work is not None:
            self._work.wait()
        for rows, places in self._halo.plan.sums:
            d_own[:, rows] += self._received[places].transpose(0, 1)
        self._received = self._send = None
