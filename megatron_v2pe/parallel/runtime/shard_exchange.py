"""Sum and gather the shards of a buffer over gloo, each byte sent once.

    sum_shards      rank r ends with the sum of all ranks' shard r        in the place of a reduce-scatter
    gather_shards   rank r's shard r comes to all                          in the place of an all-gather

torch's gloo has no reduce-scatter: it copies the buffer, sums all of it on every rank, and keeps a shard. Two ranks and
216 MB of gradients took 0.22 s of a rank's processor time that way and 0.06 s this way; a gather 0.18 s and 0.05 s.

A shard is summed on one rank alone: its own part first, then those of the ranks before it, one after the other. For two
ranks these are gloo's sums to the bit; for more, they are added in another order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_ELEMENTS = 2**20  # received while the piece before is added; what is added is still in a cache


def sum_shards(buffer: Tensor, group: dist.ProcessGroup) -> None:
    """Add up this rank's shard over the ranks of a group, in place; other shards stay as they are. Collective.

    Args:
        buffer: one-dimensional, in host memory; its length is a multiple of the number of ranks.
        group: of gloo.
    """
    size, rank = group.size(), group.rank()
    shards = buffer.chunk(size)
    pieces = len(shards[rank].split(PIECE_ELEMENTS))
    arriving = [torch.empty_like(shards[rank][:PIECE_ELEMENTS]) for _ in range(min(pieces, 2))]
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        outgoing, sums = shards[to].split(PIECE_ELEMENTS), shards[rank].split(PIECE_ELEMENTS)
        received = [arriving[number % 2][: len(piece)] for number, piece in enumerate(sums)]
        works = _exchange(outgoing[0], to, received[0], source, group)
        for number, piece in enumerate(sums):
            current, after = works, number + 1
            if after < pieces:
                works = _exchange(outgoing[after], to, received[after], source, group, tag=after % 2)
            for work in current:
                work.wait()
            piece += received[number]


def gather_shards(buffer: Tensor, group: dist.ProcessGroup) -> None:
    """Fill every rank's buffer with the shards that the ranks hold, in place. Collective.

    Args:
        buffer: as in `sum_shards`; this rank's shard is sent, the others are overwritten.
        group: of gloo.
    """
    size, rank = group.size(), group.rank()
    shards = buffer.chunk(size)
    works = []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        works += _exchange(shards[rank], to, shards[source], source, group)
    for work in works:
        work.wait()


def _exchange(
    send: Tensor, to: int, receive: Tensor, source: int, group: dist.ProcessGroup, *, tag: int = 0
) -> list[dist.Work]:
    """Start sending to one rank of the group and receiving from another."""
    operations = [
        dist.P2POp(dist.isend, send, group=group, group_peer=to, tag=tag),
        dist.P2POp(dist.irecv, receive, group=group, group_peer=source, tag=tag),
    ]
    return dist.batch_isend_irecv(operations)
