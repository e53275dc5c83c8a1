"""by_document: keys of a document go straight from each rank that holds a part of it to the others that do.

    step 0    my keys
    step i    keys of the rank i places back, of documents that both hold, received while step i-1 was computed

Ranks without a common document exchange nothing. Of a lower rank only its early zigzag chunks arrive, for no query sees
its late ones: a ring must pass them on, a direct exchange need not. Backward does the same, and returns gradients of
exactly these rows to the owner.

Rows received by a rank, forward: see `shards.rows_received`; backward as many keys, and as many gradients sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.parallel.attention.block_batches import Block, BlockBatch, batched
from megatron_v2pe.parallel.attention.blockwise import Lengths
from megatron_v2pe.parallel.shards import Holders, local_lengths

KEYS_TAG, GRADIENTS_TAG = 4, 5  # beside those of `ring` and `cached`


@dataclass(
    frozen=True, eq=False
)  # looked up by identity: hashing hundreds of documents takes long; see `places_of`
class Places:
    """Which rank holds which documents.

    Attributes:
        lengths: padded tokens of each document, of the whole pack.
        holders: ranks of each document, ascending.
    """

    lengths: tuple[int, ...]
    holders: Holders

    def local(self, rank: int) -> Lengths:
        """Tokens of each document that a rank holds."""
        return tuple(n for n in local_lengths(self.lengths, self.holders, rank) if n)


@lru_cache(maxsize=64)  # one for all layers of a micro batch
def places_of(lengths: tuple[int, ...], holders: Holders) -> Places:
    """The same object for the same documents."""
    return Places(lengths, holders)


@dataclass(frozen=True)
class _Shared:
    """A document that two ranks hold: where its rows start on either, and how many of each."""

    query_start: int
    key_start: int
    length: int


@lru_cache(maxsize=512)  # the same for all layers of a micro batch, forward and backward
def _shared(places: Places, rank: int, source: int) -> tuple[_Shared, ...]:
    starts = {}
    for each in {rank, source}:
        lengths = local_lengths(places.lengths, places.holders, each)
        starts[each] = [stop - length for stop, length in zip(accumulate(lengths), lengths, strict=True)]
    return tuple(
        _Shared(starts[rank][number], starts[source][number], length // len(ranks))
        for number, (length, ranks) in enumerate(zip(places.lengths, places.holders, strict=True))
        if rank in ranks and source in ranks and length
    )


@lru_cache(maxsize=512)
def _blocks(places: Places, rank: int, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
    """Blocks that `rank` computes with what `source` sends it; rows of keys count in what was sent."""
    blocks, at = [], 0
    for shared in _shared(places, rank, source):
        half = shared.length // 2
        first = half if source > rank else 0
        keys = half if source < rank else shared.length
        start = shared.key_start if source == rank else at
        blocks.append(
            Block((shared.query_start + first, shared.query_start + shared.length), (start, start + keys))
        )
        at += keys
    return batched(blocks, causal=source == rank, first=source == rank, device=device)


@lru_cache(maxsize=512)
def _sent(places: Places, owner: int, receiver: int, device: torch.device) -> Tensor:
    """Local rows of `owner` that `receiver` needs, in the order in which they are sent, int64."""
    rows = [
        torch.arange(shared.key_start, shared.key_start + shared.length // (2 if owner < receiver else 1))
        for shared in _shared(places, receiver, owner)
    ]
    return to_device([torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]).numpy()], device)[0]


class Direct:
    """A `KVTransport` between the ranks that hold parts of the same documents.

    Args:
        group: context parallel ranks, at least two.
        places: which rank holds which documents.
    """

    def __init__(self, group: dist.ProcessGroup, places: Places) -> None:
        self.group = group
        self.places = places
        self.size: int = group.size()
        self.rank: int = group.rank()
        self.brings = True

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """See `KVTransport`."""
        return _blocks(self.places, self.rank, source, device)

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My keys first; then, of each lower rank, wrapping around, those that I need."""
        source, current = self.rank, torch.stack([key, value])
        mine = current
        for step in range(self.size):
            arriving = self._next_keys(mine, step + 1) if step < self.size - 1 else None
            yield source, current[0], current[1]
            if arriving is not None:
                source, current = (self.rank - step - 1) % self.size, arriving.wait()

    def _next_keys(self, mine: Tensor, step: int) -> Exchange:
        receiver, source = (self.rank + step) % self.size, (self.rank - step) % self.size
        rows = _sent(self.places, self.rank, receiver, mine.device)
        count = len(_sent(self.places, source, self.rank, mine.device))
        return self.exchange(
            mine[:, rows], receiver, mine.new_empty(2, count, *mine.shape[2:]), source, tag=KEYS_TAG
        )

    def exchange(self, send: Tensor, to: int, receive: Tensor, source: int, *, tag: int) -> Exchange:
        """Start sending to one rank and receiving from another; nothing is sent where there are no rows."""
        operations = []
        if send.shape[1]:
            there = dist.get_global_rank(self.group, to)
            operations.append(dist.P2POp(dist.isend, send.contiguous(), there, group=self.group, tag=tag))
        if receive.shape[1]:
            there = dist.get_global_rank(self.group, source)
            operations.append(dist.P2POp(dist.irecv, receive, there, group=self.group, tag=tag))
        works = dist.batch_isend_irecv(operations) if operations else []
        return Exchange(receive, works, operations)

    def grad_return(self, lengths: Lengths, like: Tensor) -> _DirectGradReturn:
        """See `KVTransport`."""
        return _DirectGradReturn(self, like)


class Exchange:
    """A send and a receive in flight; keeps both buffers alive until `wait`, to be called once."""

    def __init__(self, receive: Tensor, works: list[dist.Work], operations: list[dist.P2POp]) -> None:
        self._receive = receive
        self._works = works
        self._operations = operations  # which hold what is being sent

    def wait(self) -> Tensor:
        """What was received."""
        for work in self._works:
            work.wait()
        return self._receive


class _DirectGradReturn:
    """A `GradReturn` with one exchange in flight at a time, in the steps of `Direct.iter_kv`."""

    def __init__(self, direct: Direct, like: Tensor) -> None:
        self._direct = direct
        self._like = like
        self._exchange: Exchange | None = None
        self._user = direct.rank  # the rank whose gradients of my keys are in flight

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """See `GradReturn`."""
        self.finish(d_own)
        direct, like = self._direct, self._like
        step = (direct.rank - source) % direct.size
        self._user = (direct.rank + step) % direct.size
        rows = len(_sent(direct.places, source, direct.rank, like.device))
        send = like.new_empty(2, rows, *like.shape[1:])
        for batch, block in zip(direct.blocks((), source, like.device), blocks, strict=True):
            send[:, batch.keys] = block
        count = len(_sent(direct.places, direct.rank, self._user, like.device))
        receive = like.new_empty(2, count, *like.shape[1:])
        self._exchange = direct.exchange(send, source, receive, self._user, tag=GRADIENTS_TAG)

    def finish(self, d_own: Tensor) -> None:
        """See `GradReturn`."""
        if self._exchange is None:
            return
        received = self._exchange.wait()
        if received.shape[1]:
            d_own[:, _sent(self._direct.places, self._direct.rank, self._user, d_own.device)] += received
        self._exchange = None
