"""all_gather: every rank receives all keys at once; gradients return in one exchange.

    forward     gather K, V of all ranks, in flight while the own block is computed
    backward    gather once more (keeping them would hold the whole sequence in every layer), then reduce-scatter
                dK, dV

One collective instead of cp-1 hops, which is faster where a hop's latency is high and shards are short. It holds all
keys of the pack for a moment, cp times as many as a ring.

The reduce-scatter is an all-to-all that the owner sums in float32: torch's would sum in the keys' dtype, and would
send the rows too that causal attention never uses.

Bytes sent by a rank, B = bytes of its own K and V: forward (cp-1) B; backward (cp-1) B for the keys, and for gradients
B for each higher and B/2 for each lower rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.attention.block_batches import BlockBatch, block_batches, num_key_rows
from megatron_v2pe.parallel.attention.blockwise import Lengths


class Gather:
    """A `KVTransport` that brings all keys in one collective.

    Args:
        group: context parallel ranks, at least two.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size: int = group.size()
        self.rank: int = group.rank()
        self.brings = True

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My keys first, while the others' are in flight."""
        mine = torch.stack([key, value])
        everyone = mine.new_empty(self.size * 2, *key.shape)
        gathering = _all_gather()(everyone, mine, group=self.group, async_op=True)
        yield self.rank, key, value
        gathering.wait()
        for step in range(1, self.size):
            source = (self.rank - step) % self.size
            yield source, everyone[2 * source], everyone[2 * source + 1]

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """See `KVTransport`."""
        return block_batches(lengths, rank=self.rank, source=source, device=device)

    def grad_return(self, lengths: Lengths, like: Tensor) -> _GatherGradReturn:
        """See `KVTransport`."""
        return _GatherGradReturn(self, lengths, like)


def _all_gather() -> Any:
    """torch 2.13 renamed it, and warns about the old name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _GatherGradReturn:
    """A `GradReturn` that collects the gradients of all remote keys and exchanges them at the end."""

    def __init__(self, gather: Gather, lengths: Lengths, like: Tensor) -> None:
        self._gather = gather
        self._lengths = lengths
        self._like = like
        self._blocks: dict[int, list[Tensor]] = {}

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """See `GradReturn`."""
        self._blocks[source] = blocks

    def finish(self, d_own: Tensor) -> None:
        """See `GradReturn`."""
        size, me, like = self._gather.size, self._gather.rank, self._like
        # Rows first, so that what one owner gets is contiguous: [rows, 2, k, d].
        blocks = [block.transpose(0, 1) for source in range(size) for block in self._blocks.get(source, [])]
        send = torch.cat(blocks) if blocks else like.new_empty(0, 2, *like.shape[1:])
        send_counts = [
            sum(block.shape[1] for block in self._blocks.get(source, [])) for source in range(size)
        ]
        batches_of_users = [
            () if user == me else block_batches(self._lengths, rank=user, source=me, device=like.device)
            for user in range(size)
        ]
        receive_counts = [num_key_rows(batches) for batches in batches_of_users]
        received = send.new_empty(sum(receive_counts), *send.shape[1:])
        dist.all_to_all_single(received, send, receive_counts, send_counts, group=self._gather.group)
        start = 0
        for batch in (batch for batches in batches_of_users for batch in batches):
            stop = start + batch.num_keys
            d_own[:, batch.keys] += received[start:stop].transpose(0, 1)
            start = stop
