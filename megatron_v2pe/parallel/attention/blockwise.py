"""Causal attention of documents, block by block as keys of other ranks arrive, forward and backward.

    forward     for each arrival: attend to its blocks, merge them by their log-sum-exp
    backward    for each arrival: the blocks' share of the gradients; dK, dV return to the owner of the keys

How keys arrive is a `KVTransport`: not at all (one rank), in a ring, or gathered at once. A block's dK, dV are
rounded once to the keys' dtype to be sent and summed in float32 by the owner, so rounding errors do not accumulate.

Shape legend: l local tokens, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_v2pe.parallel.attention.block_batches import BlockBatch, block_batches
from megatron_v2pe.parallel.attention.kernels import block_backward, block_forward

Lengths = tuple[int, ...]


class GradReturn(Protocol):
    """Sends gradients of remote keys to their owners, and adds what the others computed to mine."""

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """Send gradients [2, rows, k, d] of each block batch with keys of rank `source`, in order of arrival."""

    def finish(self, d_own: Tensor) -> None:
        """Wait until what the others computed is added to my gradients [2, l, k, d]."""


class KVTransport(Protocol):
    """How keys and values reach this rank, and gradients return to the owners.

    Attributes:
        size: ranks that share the documents.
        rank: this one.
    """

    size: int
    rank: int

    def iter_kv(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (source rank, keys, values) of every rank once, my own first."""

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """What this rank computes with the keys that `iter_kv` brings of rank `source`."""

    def grad_return(self, lengths: Lengths, like: Tensor) -> GradReturn:
        """For one backward pass; `like` gives shape, dtype and device of keys."""


class LocalKV:
    """The transport of a rank that holds whole documents: its own keys are all there are."""

    size = 1
    rank = 0

    def iter_kv(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My own keys."""
        yield 0, key, value

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """Each document with itself."""
        return block_batches(lengths, rank=0, source=source, device=device)

    def grad_return(self, lengths: Lengths, like: Tensor) -> GradReturn:
        """Nothing is sent."""
        return self

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """Never called: there are no remote keys."""
        raise AssertionError("a rank that holds whole documents has no remote keys")

    def finish(self, d_own: Tensor) -> None:
        """Nothing was sent."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Lengths, scale: float, transport: KVTransport
) -> Tensor:
    """Causal attention within documents, differentiable.

    Args:
        query: [l, h, d], this rank's zigzag shard, documents one after the other.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        lengths: local tokens of each document; on several ranks each must be even (two zigzag chunks).
        scale: factor of the scores.
        transport: brings the other ranks' keys.

    Returns:
        [l, h, d] in the dtype of `query`.

    Raises:
        ValueError: the documents' lengths do not sum to the number of queries.
    """
    if sum(lengths) != len(query):
        raise ValueError(f"documents of {sum(lengths)} local tokens, but {len(query)} queries")
    return _Blockwise.apply(query, key, value, tuple(lengths), scale, transport)


class _Blockwise(torch.autograd.Function):
    """Saves queries, own keys and values, output and log-sum-exp; remote keys are fetched again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Lengths,
        scale: float,
        transport: KVTransport,
    ) -> Tensor:
        ctx.lengths, ctx.scale, ctx.transport = lengths, scale, transport
        whole = _all_rows(lengths, transport, device=query.device)
        if whole is not None:
            out, lse = block_forward(query, key, value, blocks=whole.blocks, causal=True, scale=scale)
            out = out.to(query.dtype)
            ctx.save_for_backward(query, key, value, out, lse)
            return out
        merged = _Merged(query, exact=transport.size > 1)
        for source, keys, values in transport.iter_kv(key, value):
            for batch in transport.blocks(lengths, source, query.device):
                block_out, block_lse = block_forward(
                    query[batch.queries],
                    keys[batch.keys],
                    values[batch.keys],
                    blocks=batch.blocks,
                    causal=batch.causal,
                    scale=scale,
                )
                merged.add(batch, block_out, block_lse)
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, merged.lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad, transport = grads[0].contiguous(), ctx.transport
        whole = _all_rows(ctx.lengths, transport, device=query.device)
        if whole is not None:
            gradients = block_backward(
                grad, query, key, value, out, lse, blocks=whole.blocks, causal=True, scale=ctx.scale
            )
            inputs = (query, key, value)
            return *(each.to(x.dtype) for each, x in zip(gradients, inputs, strict=True)), None, None, None
        working = torch.promote_types(query.dtype, torch.float32)
        dq = torch.empty_like(query, dtype=working)
        d_own = torch.empty(2, *key.shape, dtype=working, device=key.device)
        grad_return = transport.grad_return(ctx.lengths, key)
        for source, keys, values in transport.iter_kv(key, value):
            blocks = []
            for batch in transport.blocks(ctx.lengths, source, query.device):
                rows = batch.queries
                dq_block, *dkv = block_backward(
                    grad[rows],
                    query[rows],
                    keys[batch.keys],
                    values[batch.keys],
                    out[rows],
                    lse[rows],
                    blocks=batch.blocks,
                    causal=batch.causal,
                    scale=ctx.scale,
                )
                if batch.causal:  # the diagonal arrives first and fills every row
                    dq[rows] = dq_block.to(working)
                    d_own[:, batch.keys] = torch.stack(dkv).to(working)
                else:
                    dq[rows] += dq_block
                    blocks.append(torch.stack(dkv).to(key.dtype))
            if source != transport.rank:
                grad_return.send(source, blocks, d_own)
        grad_return.finish(d_own)
        return dq.to(query.dtype), d_own[0].to(key.dtype), d_own[1].to(value.dtype), None, None, None


def _all_rows(lengths: Lengths, transport: KVTransport, *, device: torch.device) -> BlockBatch | None:
    """The block batch of a rank on its own whose documents are one call, all rows in their order; None elsewhere.

    Nothing has to be merged or put in its place then.
    """
    if transport.size > 1:
        return None
    batches = block_batches(lengths, rank=0, source=0, device=device)
    return batches[0] if len(batches) == 1 and isinstance(batches[0].queries, slice) else None


class _Merged:
    """Output and log-sum-exp over the blocks that were added so far.

    lse = log(e^lse + e^block_lse),  out = (out e^lse + block e^block_lse) / (e^lse + e^block_lse), written with
    a sigmoid so that nothing overflows.
    """

    def __init__(self, query: Tensor, *, exact: bool) -> None:
        working = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.empty_like(query, dtype=working if exact else query.dtype)
        self.lse = torch.empty(query.shape[:2], dtype=working, device=query.device)

    def add(self, batch: BlockBatch, block_out: Tensor, block_lse: Tensor) -> None:
        """Merge a block [s, h, d], [s, h]; a diagonal block arrives first and fills its rows."""
        rows = batch.queries
        if batch.causal:
            self.out[rows] = block_out.to(self.out.dtype)
            self.lse[rows] = block_lse
            return
        out, lse = self.out[rows], self.lse[rows]
        share = torch.sigmoid(block_lse - lse).unsqueeze(-1)  # of the block in the sum of both
        self.out[rows] = torch.lerp(out, block_out.to(out.dtype), share)
        self.lse[rows] = torch.logaddexp(lse, block_lse)
