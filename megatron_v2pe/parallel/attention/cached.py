"""Attention of new tokens to a cache of keys and values, on one rank or over context parallel ranks.

    prompt     one rank: all tokens attend causally, keys are kept
               cp ranks: the back end attends over ranks as in training, each rank keeps its own shard's keys
    new token  one rank: it attends to all keys
               cp ranks: it attends to each rank's keys; the parts are merged by their log-sum-exp

Every rank computes the new token's query; only keys and values are spread, so that a document of a million tokens
needs a cp-th of them on each rank. What is sent for a new token is one output and log-sum-exp per layer.

Shape legend: t new tokens, T tokens seen, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.kv_cache import KeyValueCache
from megatron_v2pe.parallel.attention.kernels import block_forward


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cache: KeyValueCache,
    layer_number: int,
    scale: float,
    attend_prompt: Callable[[], Tensor],
) -> Tensor:
    """Attend with a cache, which is extended; without gradients.

    Args:
        query: [t, h, d], the newest tokens, rotated; on cp ranks the zigzag shard of the prompt, or one token.
        key: [t, k, d], rotated like `query`.
        value: [t, k, d].
        cache: keys and values of earlier tokens.
        layer_number: its key.
        scale: factor of the scores.
        attend_prompt: attention over ranks of the whole prompt, [t, h * d]; called on cp ranks only.

    Returns:
        [t, h * d].
    """
    if cache.group is None:
        key, value = cache.extend(layer_number, key, value)
        return attend_to_all(query, key, value, scale=scale).flatten(1)
    if cache.is_empty(layer_number):
        cache.add_prompt_share(layer_number, key, value)
        return attend_prompt()
    key, value = cache.add_turn(layer_number, key, value)
    return attend_over_ranks(query, key, value, scale=scale, group=cache.group).flatten(1)


def attend_to_all(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Attention of the last tokens of a document to all of it, without gradients.

    Query i sees keys 0..T-t+i, the mask aligned at the bottom right.

    Args:
        query: [t, h, d], the newest tokens.
        key: [T, k, d], all tokens.
        value: [T, k, d].
        scale: factor of the scores.
    """
    past = len(key) - len(query)
    with torch.no_grad():
        out, lse = block_forward(query, key[past:], value[past:], causal=True, scale=scale)
        if past:
            before, before_lse = block_forward(query, key[:past], value[:past], causal=False, scale=scale)
            out = out + torch.sigmoid(before_lse - lse).unsqueeze(-1) * (before - out)
    return out.to(query.dtype)


def attend_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Attention of one token to the keys of all ranks, without gradients; the same bits on every rank.

    Args:
        query: [1, h, d], the same on all ranks.
        key: [T_local, k, d], what this rank holds; may be nothing.
        value: [T_local, k, d].
        scale: factor of the scores.
        group: context parallel ranks.
    """
    heads, dim = query.shape[1:]
    dtype = torch.promote_types(query.dtype, torch.float32)
    part = query.new_zeros(heads, dim + 1, dtype=dtype)  # output beside its log-sum-exp
    part[:, dim] = float("-inf")
    with torch.no_grad():
        if len(key):
            out, lse = block_forward(query, key, value, causal=False, scale=scale)
            part = torch.cat([out[0], lse[0].unsqueeze(-1)], dim=-1).to(dtype)
        parts = part.new_empty(group.size() * heads, dim + 1)
        dist.all_gather_into_tensor(parts, part, group=group)
        parts = parts.unflatten(0, (group.size(), heads))
        weights = parts[..., dim:].softmax(dim=0)
        return (weights * parts[..., :dim]).sum(dim=0, keepdim=True).to(query.dtype)
