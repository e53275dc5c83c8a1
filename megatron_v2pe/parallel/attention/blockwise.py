"""Causal attention of documents, block by block as keys of other ranks arrive, forward and backward.

    forward     for each arrival: attend to its blocks, merge them by their log-sum-exp; then the sink, once
    backward    for each arrival: the blocks' share of the gradients; dK, dV return to the owner of the keys

A sink is a logit s of a query head that joins the softmax and has no value: out sigmoid(lse - s), and log(e^lse + e^s)
in the place of lse. The blocks' share of the gradients is right when it is given these two, and

    ds = -sum over queries of e^(s - lse') (grad . out')

How keys arrive is a `KVTransport`: not at all (one rank), in a ring, or gathered at once. A block's dK, dV are
rounded once to the keys' dtype to be sent and summed in float32 by the owner, so rounding errors do not accumulate.

Shape legend: l local tokens, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from megatron_v2pe.parallel.attention.block_batches import BlockBatch, block_batches
from megatron_v2pe.parallel.attention.kernels import block_backward, block_forward
from megatron_v2pe.parallel.attention.windows import own_blocks, whole_documents

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
        rank: this one.
        brings: whether it brings keys that are not this rank's rows.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def brings(self) -> bool: ...  # noqa: D102

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (source rank, keys, values) of every rank once, my own first."""

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """What this rank computes with the keys that `iter_kv` brings of rank `source`."""

    def grad_return(self, lengths: Lengths, like: Tensor) -> GradReturn:
        """For one backward pass; `like` gives shape, dtype and device of keys."""


@dataclass(frozen=True)
class LocalKV:
    """The transport of a rank that holds whole documents: its own keys are all there are.

    Attributes:
        window: keys that a query sees, itself included; None for all before it.
    """

    window: int | None = None
    rank: ClassVar[int] = 0
    brings: ClassVar[bool] = False

    def iter_kv(self, lengths: Lengths, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """My own keys."""
        yield 0, key, value

    def blocks(self, lengths: Lengths, source: int, device: torch.device) -> tuple[BlockBatch, ...]:
        """Each document with itself."""
        if self.window is not None:
            return _windows(lengths, self.window, device)
        return block_batches(lengths, rank=0, source=source, device=device)

    def grad_return(self, lengths: Lengths, like: Tensor) -> GradReturn:
        """Nothing is sent."""
        return self

    def send(self, source: int, blocks: list[Tensor], d_own: Tensor) -> None:
        """Never called: there are no remote keys."""
        raise AssertionError("a rank that holds whole documents has no remote keys")

    def finish(self, d_own: Tensor) -> None:
        """Nothing was sent."""


@lru_cache(maxsize=32)  # the same for all windowed layers of a micro batch, forward and backward
def _windows(lengths: Lengths, window: int, device: torch.device) -> tuple[BlockBatch, ...]:
    return own_blocks(whole_documents(lengths), window=window, device=device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Lengths,
    scale: float,
    transport: KVTransport,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents, differentiable.

    Args:
        query: [l, h, d], this rank's zigzag shard, documents one after the other.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        lengths: local tokens of each document; on several ranks each must be even (two zigzag chunks).
        scale: factor of the scores.
        transport: brings the other ranks' keys, and knows which of them a query sees.
        sink: [h], an extra logit of each query head; None for none.

    Returns:
        [l, h, d] in the dtype of `query`.

    Raises:
        ValueError: the documents' lengths do not sum to the number of queries.
    """
    if sum(lengths) != len(query):
        raise ValueError(f"documents of {sum(lengths)} local tokens, but {len(query)} queries")
    return _Blockwise.apply(query, key, value, sink, tuple(lengths), scale, transport)


class _Blockwise(torch.autograd.Function):
    """Saves queries, own keys and values, the sink, output and log-sum-exp; remote keys are fetched again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        lengths: Lengths,
        scale: float,
        transport: KVTransport,
    ) -> Tensor:
        ctx.lengths, ctx.scale, ctx.transport = lengths, scale, transport
        whole = _all_rows(lengths, transport, device=query.device)
        if whole is not None:
            out, lse = block_forward(query, key, value, blocks=whole.blocks, causal=True, scale=scale)
        else:
            out, lse = _merged(ctx, query, key, value, exact=transport.brings or sink is not None)
        if sink is not None:
            out, lse = add_sink(out, lse, sink)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink, out, lse = ctx.saved_tensors
        grad, transport = grads[0].contiguous(), ctx.transport
        d_sink = _sink_gradient(grad, out, lse, sink) if ctx.needs_input_grad[3] else None
        whole = _all_rows(ctx.lengths, transport, device=query.device)
        if whole is not None:
            gradients = block_backward(
                grad, query, key, value, out, lse, blocks=whole.blocks, causal=True, scale=ctx.scale
            )
            inputs = (query, key, value)
            dq, dk, dv = (each.to(x.dtype) for each, x in zip(gradients, inputs, strict=True))
            return dq, dk, dv, d_sink, None, None, None
        working = torch.promote_types(query.dtype, torch.float32)
        dq = torch.empty_like(query, dtype=working)
        d_own = torch.empty(2, *key.shape, dtype=working, device=key.device)
        grad_return = transport.grad_return(ctx.lengths, key)
        for source, keys, values in transport.iter_kv(ctx.lengths, key, value):
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
                if batch.first:  # the diagonal arrives first and fills every row
                    dq[rows] = dq_block.to(working)
                    d_own[:, batch.keys] = torch.stack(dkv).to(working)
                    continue
                dq[rows] += dq_block
                if source == transport.rank:
                    d_own[:, batch.keys] += torch.stack(dkv)
                else:
                    blocks.append(torch.stack(dkv).to(key.dtype))
            if source != transport.rank:
                grad_return.send(source, blocks, d_own)
        grad_return.finish(d_own)
        return dq.to(query.dtype), d_own[0].to(key.dtype), d_own[1].to(value.dtype), d_sink, None, None, None


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let an extra logit join the merged softmax; once, after all keys.

    Args:
        out: [l, h, d], attention to all keys.
        lse: [l, h], log-sum-exp of their scores.
        sink: [h].

    Returns:
        Output [l, h, d] and log-sum-exp [l, h] of both, in the dtype of `lse`.
    """
    extra = sink.to(lse.dtype)
    return out.to(lse.dtype) * torch.sigmoid(lse - extra).unsqueeze(-1), torch.logaddexp(lse, extra)


def _sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """[h]: the share that the sink has of each query's weights moves the output towards zero."""
    along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [l, h]
    return -(torch.exp(sink.to(lse.dtype) - lse) * along).sum(0).to(sink.dtype)


def _merged(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of all sources."""
    transport = ctx.transport
    own = transport.blocks(ctx.lengths, transport.rank, query.device)
    merged = _Merged(query, exact=exact or not all(batch.first for batch in own))
    for source, keys, values in transport.iter_kv(ctx.lengths, key, value):
        for batch in transport.blocks(ctx.lengths, source, query.device):
            block_out, block_lse = block_forward(
                query[batch.queries],
                keys[batch.keys],
                values[batch.keys],
                blocks=batch.blocks,
                causal=batch.causal,
                scale=ctx.scale,
            )
            merged.add(batch, block_out, block_lse)
    return merged.out, merged.lse


def _all_rows(lengths: Lengths, transport: KVTransport, *, device: torch.device) -> BlockBatch | None:
    """The block batch of a rank on its own whose documents are one call, all rows in their order; None elsewhere.

    Nothing has to be merged or put in its place then.
    """
    if transport.brings:
        return None
    batches = transport.blocks(lengths, transport.rank, device)
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
        if batch.first:
            self.out[rows] = block_out.to(self.out.dtype)
            self.lse[rows] = block_lse
            return
        out, lse = self.out[rows], self.lse[rows]
        share = torch.sigmoid(block_lse - lse).unsqueeze(-1)  # of the block in the sum of both
        self.out[rows] = torch.lerp(out, block_out.to(out.dtype), share)
        self.lse[rows] = torch.logaddexp(lse, block_lse)
