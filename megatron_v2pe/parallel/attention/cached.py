"""Attention of new tokens to themselves and to a cache of keys and values spread over context parallel ranks.

    prefill chunk   own part: causal, zigzag over ranks, keys exchanged as in training
                    past:     pass-Q   gather queries -> partial over the own shard of keys -> partials back -> merge
                              pass-KV  shards of keys go round the ring -> partial over each -> merge
    new tokens      every rank has them all: partial over the own shard -> parts of all ranks -> merge

Parts are merged by their log-sum-exp, so which rank holds which key does not matter. Pass-Q sends as much for a past
of a million tokens as for none; pass-KV moves the past, and wins while it is shorter than the chunk or so.

Layers with a sliding window read the rows that it reaches and no others. A chunk's are exchanged as in training: the
rows of the past are before those of the chunk (`transports.halo`). A sink joins the softmax once, when all is merged.

Shape legend: l local tokens of a chunk, b sequences, h query heads, k key heads, d head dimension, r rows [k, r, d].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.kv_cache import CacheStep
from megatron_v2pe.parallel.attention.blockwise import KVTransport, LocalKV, add_sink, attend
from megatron_v2pe.parallel.attention.kernels import block_forward
from megatron_v2pe.parallel.attention.rows import Partial, attend_rows, fold, unfold
from megatron_v2pe.parallel.attention.transports.halo import Halo, HaloPlan, RankTokens, plan_halo
from megatron_v2pe.parallel.attention.transports.ring import Ring
from megatron_v2pe.parallel.zigzag import shard_ranges

PAST_TAG = 3  # beside those of `ring`


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's number, and how it makes weights of scores; see `cached_attention`."""

    number: int
    scale: float
    window: int | None
    sink: Tensor | None


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    step: CacheStep,
    layer_number: int,
    scale: float,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attend with caches, which are extended; without gradients.

    Args:
        query: [l, h, d] of a chunk, this rank's zigzag shard; [b, h, d] of new tokens, the same on all ranks.
        key: [l, k, d] or [b, k, d], rotated like `query`.
        value: as `key`.
        step: what is done.
        layer_number: key of the caches.
        scale: factor of the scores.
        window: newest tokens that a query sees, itself included; None for all.
        sink: [h], an extra logit of each query head that joins the softmax and has no value; None for none.

    Returns:
        [l, h * d] or [b, h * d] in the dtype of `query`.
    """
    layer = _Layer(layer_number, scale, window, sink)
    with torch.no_grad():
        if not step.is_chunk:
            out = _attend_new_tokens(query, key, value, step, layer)
        elif window is None:
            out = _attend_chunk(query, key, value, step, layer)
        else:
            out = _attend_chunk_in_window(query, key, value, step, layer)
        return out.to(query.dtype).flatten(1)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, step: CacheStep, layer: _Layer) -> Tensor:
    store, scale = step.stores[0], layer.scale
    total = attend_own(
        query, key, value, scale=scale, transport=LocalKV() if step.group is None else Ring(step.group)
    )
    if any(step.past_rows):
        parts = store.parts(layer.number)
        if step.group is None:
            past = unfolded(attend_parts(fold(query, key.shape[1]), parts, scale=scale), len(query))
        elif passes_queries(query, key, past_rows=step.past_rows):
            past = attend_past_by_queries(query, key.shape[1], parts, step.group, scale=scale)
        else:
            past = attend_past_by_keys(query, key, parts, step.past_rows, step.group, scale=scale)
        total.add(past)
    store.append(layer.number, key[: step.kept], value[: step.kept])
    return total.out if layer.sink is None else add_sink(total.out, total.lse, layer.sink)[0]


def _attend_chunk_in_window(
    query: Tensor, key: Tensor, value: Tensor, step: CacheStep, layer: _Layer
) -> Tensor:
    store, window = step.stores[0], layer.window
    assert window is not None
    rank = 0 if step.group is None else step.group.rank()
    if window not in step.halo_plans:  # the same for all windowed layers of the pass
        step.halo_plans[window] = chunk_plan(step, window, rank=rank, device=query.device)
    first = store.rows_of(rank, max(0, step.start - window + 1))
    parts = [torch.stack(part).transpose(1, 2) for part in store.parts(layer.number, first)]
    past = torch.cat([key.new_empty(2, 0, *key.shape[1:]), *parts], dim=1)  # [2, n, k, d]
    halo = Halo(step.halo_plans[window], step.group, past)
    out = attend(query, key, value, lengths=(len(query),), scale=layer.scale, transport=halo, sink=layer.sink)
    store.append(layer.number, key[: step.kept], value[: step.kept])
    return out


def chunk_plan(step: CacheStep, window: int, *, rank: int, device: torch.device) -> HaloPlan:
    """Which rows of the past and of the chunk each rank sends for a layer's window.

    Args:
        step: of a prefill chunk.
        window: newest tokens that a query sees, itself included.
        rank: this one.
        device: where indices are needed.
    """
    cp = len(step.past_rows)
    tokens = []
    for each in range(cp):
        past = step.stores[0].tokens_held(each, max(0, step.start - window + 1), step.start)
        chunk = shard_ranges(np.array([0, step.padded], dtype=np.int64), cp=cp, cp_rank=each) + step.start
        held = np.concatenate([np.stack([past, past + 1], axis=1), chunk])
        tokens.append(RankTokens(held, np.column_stack([chunk, np.zeros(len(chunk), dtype=np.int64)])))
    return plan_halo(tokens, rank=rank, window=window, device=device)


def _attend_new_tokens(query: Tensor, key: Tensor, value: Tensor, step: CacheStep, layer: _Layer) -> Tensor:
    rank = 0 if step.group is None else step.group.rank()
    found = []
    for index, (store, owner) in enumerate(zip(step.stores, step.owners, strict=True)):
        row = slice(index, index + 1)
        if owner == rank:
            store.append(layer.number, key[row], value[row])
        unseen = 0 if layer.window is None else max(0, store.num_tokens - layer.window)
        parts = store.parts(layer.number, store.rows_of(rank, unseen) if unseen else 0)
        found.append(unfolded(attend_parts(fold(query[row], key.shape[1]), parts, scale=layer.scale), 1))
    part = Partial(torch.cat([each.out for each in found]), torch.cat([each.lse for each in found]))
    if step.group is not None:
        return merge_over_ranks(part, step.group, sink=layer.sink)
    return part.out if layer.sink is None else add_sink(part.out, part.lse, layer.sink)[0]


def attend_parts(rows: Tensor, parts: Iterator[tuple[Tensor, Tensor]], *, scale: float) -> Partial:
    """Attention of rows [k, r, d] to keys that come piece by piece."""
    total = Partial.empty(rows)
    for keys, values in parts:
        total.add(attend_rows(rows, keys, values, scale=scale))
    return total


def unfolded(part: Partial, tokens: int) -> Partial:
    """Rows [k, t*g, d] of a part as tokens [t, h, d]."""
    return Partial(unfold(part.out, tokens), unfold(part.lse, tokens))


def attend_own(query: Tensor, key: Tensor, value: Tensor, *, scale: float, transport: KVTransport) -> Partial:
    """Causal attention of one document to itself, zigzag over ranks: [l, h, d] with its log-sum-exp [l, h]."""
    total = Partial.empty(query)
    lengths = (len(query),)
    for source, keys, values in transport.iter_kv(lengths, key, value):
        for batch in transport.blocks(lengths, source, query.device):
            rows = query[batch.queries], keys[batch.keys], values[batch.keys]
            part = Partial(*block_forward(*rows, causal=batch.causal, scale=scale))
            if batch.causal:  # my own keys, first to come: they fill every row
                total = Partial(part.out.to(total.out.dtype), part.lse.to(total.lse.dtype))
                continue
            some = Partial(total.out[batch.queries], total.lse[batch.queries])
            some.add(part)
            total.out[batch.queries], total.lse[batch.queries] = some.out, some.lse
    return total


def passes_queries(query: Tensor, key: Tensor, *, past_rows: Sequence[int]) -> bool:
    """Whether pass-Q moves fewer bytes than pass-KV; the same answer on all ranks.

    pass-Q   l h (d e + (d + 1) e')     queries to every peer, and partial outputs with log-sum-exp back
    pass-KV  n 2 k d e                  keys and values of the fullest rank, n tokens, to every peer

    with e bytes of an element and e' of a partial's. Both are sent cp - 1 times.
    """
    tokens, heads, dim = query.shape
    partial_bytes = torch.promote_types(query.dtype, torch.float32).itemsize
    by_queries = tokens * heads * (dim * query.element_size() + (dim + 1) * partial_bytes)
    by_keys = max(past_rows) * 2 * key.shape[1] * dim * key.element_size()
    return by_queries <= by_keys


def attend_past_by_queries(
    query: Tensor,
    key_heads: int,
    parts: Iterator[tuple[Tensor, Tensor]],
    group: dist.ProcessGroup,
    *,
    scale: float,
) -> Partial:
    """Pass-Q: every rank attends for all; returns [l, h, d], merged over all ranks' keys."""
    size, (tokens, heads, dim) = group.size(), query.shape
    everyone = query.new_empty(size * tokens, heads, dim)
    dist.all_gather_into_tensor(everyone, query.contiguous(), group=group)
    part = unfolded(attend_parts(fold(everyone, key_heads), parts, scale=scale), size * tokens)
    del everyone
    sent = torch.cat([part.out, part.lse.unsqueeze(-1)], dim=-1)  # [cp*l, h, d+1], by destination
    del part
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    del sent
    parts_of_mine = received.unflatten(0, (size, tokens))
    total = Partial.empty(query)
    for some in parts_of_mine:
        total.add(Partial(some[..., :dim], some[..., dim]))
    return total


def attend_past_by_keys(
    query: Tensor,
    key: Tensor,
    parts: Iterator[tuple[Tensor, Tensor]],
    past_rows: Sequence[int],
    group: dist.ProcessGroup,
    *,
    scale: float,
) -> Partial:
    """Pass-KV: the ranks' shards of the past go round the ring; returns [l, h, d]."""
    ring, (_, key_heads, dim) = Ring(group), key.shape
    rows = fold(query, key_heads)
    mine = [torch.stack(part) for part in parts]
    here = torch.cat(mine, dim=2) if mine else key.new_empty(2, key_heads, 0, dim)  # [2, k, n, d]
    total = Partial.empty(rows)
    for hop in range(ring.size):
        coming = None
        if hop < ring.size - 1:
            source = (ring.rank - hop - 1) % ring.size
            receive = here.new_empty(2, key_heads, past_rows[source], dim)
            coming = ring.exchange(here.contiguous(), to=1, receive=receive, tag=PAST_TAG)
        if here.shape[2]:
            total.add(attend_rows(rows, here[0], here[1], scale=scale))
        if coming is not None:
            here = coming.wait()
    return unfolded(total, len(query))


def merge_over_ranks(part: Partial, group: dist.ProcessGroup, *, sink: Tensor | None = None) -> Tensor:
    """Parts [b, h, d] of all ranks and the sink [h] merged, the same bits on every rank."""
    dim = part.out.shape[-1]
    mine = torch.cat([part.out, part.lse.unsqueeze(-1)], dim=-1).contiguous()
    parts = mine.new_empty(group.size() * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(parts, mine, group=group)
    parts = parts.unflatten(0, (group.size(), len(mine)))
    scores = parts[..., dim:]
    if sink is not None:  # one more part, whose output is zero
        scores = torch.cat([scores, sink.to(scores.dtype).view(1, 1, -1, 1).expand(1, len(mine), -1, -1)])
    weights = scores.softmax(dim=0)[: group.size()]
    return (weights * parts[..., :dim]).sum(dim=0)
