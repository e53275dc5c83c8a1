"""p2p: keys are passed round a ring, each hop in flight while the keys received before are computed with.

    step 0    my keys
    step i    keys of the rank i places on, received while step i-1 was computed

Keys go to the next lower rank, and from rank 0 to the highest. As far as rank 0, all who receive them are lower than
their owner and see all of them; after it, all are higher and see none of its late zigzag chunks, so rank 0 passes on
the early ones only. A rank receives what it computes with and no more, three quarters of all keys in the mean.

Backward passes the keys round once more, and sends the gradients of each block directly to the owner while the
next block is computed.

Bytes received by a rank, B = bytes of its own K and V: forward and backward B for each higher and B/2 for each lower
rank. Sent: rank 0 (cp-1) B/2, rank r (cp-r) B + (r-1) B/2; for gradients B for each higher and B/2 for each lower rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.attention.block_batches import BlockBatch, block_batches, early_rows, num_key_rows
from megatron_v2pe.parallel.attention.blockwise import Lengths

KEYS_TAG, GRADIENTS_TAG = 1, 2  # gloo matches messages of a pair by tag; NCCL by order, the same on all ranks


class Ring:
    """A `KVTransport` that passes keys from rank to rank.

    Args:
        group: context parallel ranks, at least two.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size: int = group.size()
        self.rank: int = group.rank()
        self.brings = True

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My keys first, then each higher rank's, wrapping around; of lower ranks the early zigzag chunks.

        The next keys are in flight while the caller computes with the current ones.
        """
        current = torch.stack([key, value])
        for step in range(self.size):
            exchange = None
            if step < self.size - 1:
                is_of_lower = (self.rank + step + 1) % self.size < self.rank  # what arrives
                rows = len(key) // 2 if is_of_lower else len(key)
                arriving = current.new_empty(2, rows, *key.shape[1:])
                onward = current[:, early_rows(lengths, device=key.device)] if self.rank == 0 else current
                exchange = self.exchange(onward.contiguous(), to=-1, receive=arriving, tag=KEYS_TAG)
            yield (self.rank + step) % self.size, current[0], current[1]
            if exchange is not None:
                current = exchange.wait()

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """See `KVTransport`."""
        return block_batches(lengths, rank=self.rank, source=source, device=device, early_alone=True)

    def grad_return(self, lengths: Lengths, like: Tensor) -> _RingGradReturn:
        """See `KVTransport`."""
        return _RingGradReturn(self, lengths, like)

    def exchange(self, send: Tensor, *, to: int, receive: Tensor, tag: int) -> _Exchange:
        """Start sending to the rank `to` places on and receiving from the one `to` places back."""
        destination = dist.get_global_rank(self.group, (self.rank + to) % self.size)
        source = dist.get_global_rank(self.group, (self.rank - to) % self.size)
        operations = [
            dist.P2POp(dist.isend, send, destination, group=self.group, tag=tag),
            dist.P2POp(dist.irecv, receive, source, group=self.group, tag=tag),
        ]
        return _Exchange(send, receive, dist.batch_isend_irecv(operations))


class _Exchange:
    """A send and a receive in flight; keeps both buffers alive until `wait`, to be called once."""

    def __init__(self, send: Tensor, receive: Tensor, works: list[dist.Work]) -> None:
        self._send = send
        self._receive = receive
        self._works = works

    def wait(self) -> Tensor:
        """What was received."""
        for work in self._works:
            work.wait()
        return self._receive


class _RingGradReturn:
    """A `GradReturn` with one exchange in flight at a time.

    At step i this rank computed with the keys of the rank i places on, and the rank i places back with this rank's.
    """

    def __init__(self, ring: Ring, lengths: Lengths, like: Tensor) -> None:
        self._ring = ring
        self._lengths = lengths
        self._like = like
        self._exchange: _Exchange | None = None
        self._user = ring.rank  # the rank whose gradients of my keys are in flight

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """See `GradReturn`."""
        self.finish(d_own)
        ring, like = self._ring, self._like
        step = (source - ring.rank) % ring.size
        self._user = (ring.rank - step) % ring.size
        mine = block_batches(self._lengths, rank=self._user, source=ring.rank, device=like.device)
        receive = like.new_empty(2, num_key_rows(mine), *like.shape[1:])
        send = torch.cat(blocks, dim=1) if blocks else like.new_empty(2, 0, *like.shape[1:])
        self._exchange = ring.exchange(send, to=step, receive=receive, tag=GRADIENTS_TAG)

    def finish(self, d_own: Tensor) -> None:
        """See `GradReturn`."""
        if self._exchange is None:
            return
        received, start = self._exchange.wait(), 0
        for batch in block_batches(
            self._lengths, rank=self._user, source=self._ring.rank, device=d_own.device
        ):
            stop = start + batch.num_keys
            d_own[:, batch.keys] += received[:, start:stop]
            start = stop
        self._exchange = None
