"""Causal attention of documents that are spread over context parallel ranks, keys travelling in a ring.

    step 0        my keys         each document is causal in itself: its early chunk before its late chunk
    step i        keys of rank r-i, received while step i-1 was computed
                    from a lower rank:  all my queries see its early chunk
                    from a higher rank: my late queries see both its chunks
                  (the other combinations lie in the future and are never computed)

Forward merges blocks by their log-sum-exp. Backward sends the keys round once more and returns each block's
dK, dV straight to the owner, while the next block is computed. A block's gradients are rounded once to
the keys' dtype for the journey and summed in float32, so nothing accumulates error on the way.

Bytes sent by a rank, B = bytes of its own K and V: forward (cp-1) B; backward (cp-1) B for the keys, and for
gradients B for each higher and B/2 for each lower rank.

Shape legend: l local tokens, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.attention.kernels import block_backward, block_forward

Rows = slice | Tensor
SHORT_TOKENS = 512  # longer documents keep a kernel busy on their own, and would have to be copied
KEYS_TAG, GRADIENTS_TAG = 1, 2  # gloo matches messages of a pair by tag; NCCL by order, the same on all ranks


@dataclass(frozen=True, eq=False)
class Piece:
    """Equal blocks of one or several documents that a kernel takes in one call.

    Attributes:
        queries: local rows of the queries; a slice for one document, an index for several.
        keys: rows of the visiting keys, likewise.
        blocks: number of documents.
        causal: the diagonal.
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
def pieces(lengths: tuple[int, ...], *, rank: int, source: int, device: torch.device) -> tuple[Piece, ...]:
    """Blocks that `rank` computes with the keys of rank `source`.

    Short documents of equal length share a call, which matters on packs of many of them: 64 documents of 32
    tokens take 6 ms one by one and 1.3 ms together.

    Args:
        lengths: tokens of each document on one rank (equal on all ranks), both chunks together.
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
    found = []
    for length, starts in by_length.items():
        half = length // 2
        queries = (half, length) if source > rank else (0, length)
        keys = (0, half) if source < rank else (0, length)
        together = [starts] if length <= SHORT_TOKENS else [[start] for start in starts]
        for group in together:
            rows = _rows(group, *queries, device), _rows(group, *keys, device)
            found.append(Piece(*rows, blocks=len(group), causal=source == rank))
    return tuple(found)


def _rows(starts: list[int], low: int, high: int, device: torch.device) -> Rows:
    """Tokens low..high-1 of the documents that start at `starts`."""
    if len(starts) == 1:
        return slice(starts[0] + low, starts[0] + high)
    return (torch.tensor(starts).unsqueeze(1) + torch.arange(low, high)).flatten().to(device)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Sequence[int], scale: float, group: Any = None
) -> Tensor:
    """Causal attention within documents, differentiable.

    Args:
        query: [l, h, d], this rank's zigzag shard, documents one after the other.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        lengths: local tokens of each document; with a group each must be even (two chunks).
        scale: factor of the scores.
        group: context parallel ranks; None or a group of one attends locally.

    Returns:
        [l, h, d] in the dtype of `query`.
    """
    if sum(lengths) != len(query):
        raise ValueError(f"documents of {sum(lengths)} local tokens, but {len(query)} queries")
    return _RingAttention.apply(query, key, value, tuple(lengths), scale, group)


class _RingAttention(torch.autograd.Function):
    """Saves queries, own keys and values, output and log-sum-exp; visitors' keys are fetched again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        group: Any,
    ) -> Tensor:
        ring = _Ring(group)
        merged = _Merged(query, exact=ring.size > 1)
        for source, keys, values in ring.visits(key, value):
            for piece in ring.pieces(lengths, source, query.device):
                rows = query[piece.queries], keys[piece.keys], values[piece.keys]
                kind: dict[str, Any] = dict(blocks=piece.blocks, causal=piece.causal)
                merged.add(piece, *block_forward(*rows, **kind, scale=scale))
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, merged.lse)
        ctx.lengths, ctx.scale, ctx.group = lengths, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        ring = _Ring(ctx.group)
        working = torch.promote_types(query.dtype, torch.float32)
        dq = torch.empty_like(query, dtype=working)
        d_own = torch.empty(2, *key.shape, dtype=working, device=key.device)
        returning: _GradientExchange | None = None
        for step, (source, keys, values) in enumerate(ring.visits(key, value)):
            blocks = []
            for piece in ring.pieces(ctx.lengths, source, query.device):
                rows = piece.queries
                parts = query[rows], keys[piece.keys], values[piece.keys], out[rows], lse[rows]
                kind: dict[str, Any] = dict(blocks=piece.blocks, causal=piece.causal)
                dq_block, *dkv = block_backward(grad[rows], *parts, **kind, scale=ctx.scale)
                if piece.causal:  # the diagonal, first to come: it fills every row
                    dq[rows] = dq_block.to(working)
                    d_own[:, piece.keys] = torch.stack(dkv).to(working)
                else:
                    dq[rows] += dq_block
                    blocks.append(torch.stack(dkv).to(key.dtype))
            if returning is not None:
                returning.add_to(d_own)
            if step:
                returning = _GradientExchange(ring, blocks, lengths=ctx.lengths, step=step, like=key)
        if returning is not None:
            returning.add_to(d_own)
        return dq.to(query.dtype), d_own[0].to(key.dtype), d_own[1].to(value.dtype), None, None, None


class _Merged:
    """Output and log-sum-exp over the blocks that were added so far.

    lse = log(e^lse + e^block_lse),  out = (out e^lse + block e^block_lse) / (e^lse + e^block_lse), written with
    a sigmoid so that nothing overflows.
    """

    def __init__(self, query: Tensor, *, exact: bool) -> None:
        working = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.empty_like(query, dtype=working if exact else query.dtype)
        self.lse = torch.empty(query.shape[:2], dtype=working, device=query.device)

    def add(self, piece: Piece, block_out: Tensor, block_lse: Tensor) -> None:
        """Merge a block [s, h, d], [s, h]; a diagonal block comes first and fills its rows."""
        rows = piece.queries
        if piece.causal:
            self.out[rows], self.lse[rows] = block_out.to(self.out.dtype), block_lse
            return
        out, lse = self.out[rows], self.lse[rows]
        share = torch.sigmoid(block_lse - lse).unsqueeze(-1)  # of the block in the sum of both
        self.out[rows] = torch.lerp(out, block_out.to(out.dtype), share)
        self.lse[rows] = torch.logaddexp(lse, block_lse)


class _Ring:
    """The context parallel ranks: who am I, and whose keys come by."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    def pieces(self, lengths: tuple[int, ...], source: int, device: torch.device) -> tuple[Piece, ...]:
        """Blocks that I compute with the keys of rank `source`."""
        return pieces(lengths, rank=self.rank, source=source, device=device)

    def visits(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (source rank, keys, values): mine first, then each lower rank's, wrapping around.

        The next visitor is under way while the caller computes with the current one.
        """
        if self.size == 1:
            yield self.rank, key, value
            return
        here = torch.stack([key, value])
        for step in range(self.size):
            coming = None
            if step < self.size - 1:
                coming = self.exchange(here, to=1, receive=torch.empty_like(here), tag=KEYS_TAG)
            yield (self.rank - step) % self.size, here[0], here[1]
            if coming is not None:
                here = coming.wait()

    def exchange(self, send: Tensor, *, to: int, receive: Tensor, tag: int) -> _Exchange:
        """Start sending to the rank `to` places on and receiving from the one `to` places back."""
        peers = [(self.rank + to) % self.size, (self.rank - to) % self.size]
        onward, back = (dist.get_global_rank(self.group, peer) for peer in peers)
        operations = [
            dist.P2POp(dist.isend, send, onward, group=self.group, tag=tag),
            dist.P2POp(dist.irecv, receive, back, group=self.group, tag=tag),
        ]
        return _Exchange(send, receive, dist.batch_isend_irecv(operations))


class _Exchange:
    """A send and a receive under way; keeps both buffers alive until `wait`, to be called once."""

    def __init__(self, send: Tensor, receive: Tensor, works: list[Any]) -> None:
        self._send, self._receive, self._works = send, receive, works

    def wait(self) -> Tensor:
        """What was received."""
        for work in self._works:
            work.wait()
        return self._receive


class _GradientExchange:
    """Gradients of a visitor's keys on their way home, and mine on their way to me.

    At step i I computed with the keys of the rank i places back, and the rank i places on computed with mine.
    """

    def __init__(
        self, ring: _Ring, blocks: list[Tensor], *, lengths: tuple[int, ...], step: int, like: Tensor
    ) -> None:
        user = (ring.rank + step) % ring.size
        self._mine = pieces(lengths, rank=user, source=ring.rank, device=like.device)
        num_rows = sum(piece.num_keys for piece in self._mine)
        receive = like.new_empty(2, num_rows, *like.shape[1:])
        send = torch.cat(blocks, dim=1) if blocks else like.new_empty(2, 0, *like.shape[1:])
        self._exchange = ring.exchange(send, to=-step, receive=receive, tag=GRADIENTS_TAG)

    def add_to(self, d_own: Tensor) -> None:
        """Wait, and add what the others computed to my gradients [2, l, k, d]."""
        received = self._exchange.wait()
        start = 0
        for piece in self._mine:
            stop = start + piece.num_keys
            d_own[:, piece.keys] += received[:, start:stop]
            start = stop
