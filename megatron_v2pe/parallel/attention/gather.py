"""all_gather: every rank receives all keys at once; gradients go home in one exchange.

    forward     gather K, V of all ranks, under way while the own block is computed
    backward    gather once more (keeping them would hold the whole sequence in every layer), then reduce-scatter
                dK, dV

One collective instead of cp-1 hops, which pays where hops are dear and shards short. Its price is a transient of
all keys of the row, cp times a ring's.

The reduce-scatter is an all-to-all summed at home in float32: a collective would sum in the keys' dtype, and
would carry the rows that a block in the future never touched.

Bytes sent by a rank: as in the ring, for a collective sends each of cp-1 peers what it needs and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.attention.blockwise import Lengths
from megatron_v2pe.parallel.attention.pieces import num_key_rows, pieces


class Gather:
    """A `KVTransport` that brings all keys in one collective.

    Args:
        group: context parallel ranks, at least two.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size: int = group.size()
        self.rank: int = group.rank()

    def iter_kv(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My keys first, while the others' are under way."""
        mine = torch.stack([key, value])
        everyone = mine.new_empty(self.size * 2, *key.shape)
        gathering = _all_gather()(everyone, mine, group=self.group, async_op=True)
        yield self.rank, key, value
        gathering.wait()
        for step in range(1, self.size):
            source = (self.rank - step) % self.size
            yield source, everyone[2 * source], everyone[2 * source + 1]

    def grad_return(self, lengths: Lengths, like: Tensor) -> _GradientsOfGather:
        """See `KVTransport`."""
        return _GradientsOfGather(self, lengths, like)


def _all_gather() -> Any:
    """torch 2.13 renamed it, and warns at the old name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _GradientsOfGather:
    """Collects the gradients of all visitors' keys and exchanges them at the end."""

    def __init__(self, gather: Gather, lengths: Lengths, like: Tensor) -> None:
        self._gather, self._lengths, self._like = gather, lengths, like
        self._blocks: dict[int, list[Tensor]] = {}

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """See `GradReturn`."""
        self._blocks[source] = blocks

    def finish(self, d_own: Tensor) -> None:
        """See `GradReturn`."""
        size, me, like = self._gather.size, self._gather.rank, self._like
        # Rows first, so that what one owner gets is contiguous: [rows, 2, k, d].
        blocks = [block.transpose(0, 1) for source in range(size) for block in self._blocks.get(source, [])]
        given = torch.cat(blocks) if blocks else like.new_empty(0, 2, *like.shape[1:])
        users = [
            () if user == me else pieces(self._lengths, rank=user, source=me, device=like.device)
            for user in range(size)
        ]
        counts = [num_key_rows(mine) for mine in users]
        received = given.new_empty(sum(counts), *given.shape[1:])
        sent = [sum(block.shape[1] for block in self._blocks.get(source, [])) for source in range(size)]
        dist.all_to_all_single(received, given, counts, sent, group=self._gather.group)
        start = 0
        for piece in (piece for mine in users for piece in mine):
            stop = start + piece.num_keys
            d_own[:, piece.keys] += received[start:stop].transpose(0, 1)
            start = stop
