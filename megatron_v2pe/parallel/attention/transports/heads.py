"""a2a (Ulysses): ranks exchange tokens for heads, attend to whole documents with few heads, and exchange back.

    q, k, v [l, h + 2k, d]  --all to all-->  [t, (h + 2k) / cp, d], zigzag undone: documents whole and in order
                                               causal attention on one rank
    out [l, h, d]           <--all to all--  [t, h / cp, d]

Backward is the mirror image. Every rank computes whole documents, so work is balanced whatever their lengths and
kernels run on the largest blocks; but heads and KV heads of a tensor parallel rank must both be multiples of cp.

Bytes sent by a rank, l tokens of its own: (cp-1)/cp l (2h + 2k) d elements forward, the same backward.

Shape legend: l local tokens, t = l * cp tokens of the pack, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.blockwise import Lengths, LocalKV, attend
from megatron_v2pe.parallel.zigzag import shard_indices

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [t, h/cp, d], keys [t, k/cp, d], values) of whole documents to [t, h/cp, d]."""


def attend_by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Lengths,
    scale: float,
    group: dist.ProcessGroup,
    transport: LocalKV,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents on torch's kernels, differentiable.

    Args:
        query: [l, h, d], this rank's zigzag shard.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        lengths: local tokens of each document, even.
        scale: factor of the scores.
        group: context parallel ranks, at least two.
        transport: of whole documents, with their window.
        sink: [h], an extra logit of each query head; each rank uses those of its heads. None for none.

    Returns:
        [l, h, d] in the dtype of `query`.

    Raises:
        ConfigError: heads or KV heads do not divide by the ranks.
    """
    whole_lengths = tuple(length * group.size() for length in lengths)

    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mine = None if sink is None else sink.chunk(group.size())[group.rank()]
        return attend(query, key, value, lengths=whole_lengths, scale=scale, transport=transport, sink=mine)

    return by_heads(query, key, value, lengths=lengths, group=group, core=core)


def by_heads(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Lengths, group: dist.ProcessGroup, core: Core
) -> Tensor:
    """Exchange tokens for heads, run `core` on whole documents, exchange back; otherwise as `attend_by_heads`."""
    size = group.size()
    for what, x in (("attention heads", query), ("KV heads", key)):
        if x.shape[1] % size:
            raise ConfigError(
                f"parallel.cp_comm_type is 'a2a', but the {x.shape[1]} {what} of a tensor parallel rank do not divide "
                f"by parallel.cp = {size}; make cp or tp smaller, or use p2p"
            )
    heads = [x.shape[1] // size for x in (query, key, value)]
    # Heads of one destination side by side: [l, h, d] -> [l, cp, h / cp, d].
    split = torch.cat([x.unflatten(1, (size, -1)) for x in (query, key, value)], dim=2)
    whole = _ToHeads.apply(split, lengths, group)
    return _ToTokens.apply(core(*whole.split(heads, dim=1)), lengths, group).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    """[l, cp, n, d] -> [t, n, d]: my share of the heads of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Lengths, group: dist.ProcessGroup) -> Tensor:
        ctx.lengths = lengths
        ctx.group = group
        return tokens_to_heads(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return heads_to_tokens(grads[0], ctx.lengths, ctx.group), None, None


class _ToTokens(torch.autograd.Function):
    """[t, n, d] -> [l, cp, n, d]: all heads of my tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Lengths, group: dist.ProcessGroup) -> Tensor:
        ctx.lengths = lengths
        ctx.group = group
        return heads_to_tokens(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return tokens_to_heads(grads[0], ctx.lengths, ctx.group), None, None


def tokens_to_heads(x: Tensor, lengths: Lengths, group: dist.ProcessGroup) -> Tensor:
    """Send each rank its heads, [l, cp, n, d] -> [t, n, d] in the order of the pack."""
    send = x.transpose(0, 1).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    in_order = received.new_empty(received.shape[0] * received.shape[1], *received.shape[2:])
    in_order[shard_order(lengths, group.size(), x.device)] = received.flatten(0, 1)
    return in_order


def heads_to_tokens(x: Tensor, lengths: Lengths, group: dist.ProcessGroup) -> Tensor:
    """Send each rank its tokens, the inverse of `tokens_to_heads`: [t, n, d] -> [l, cp, n, d]."""
    size = group.size()
    send = x[shard_order(lengths, size, x.device)].unflatten(0, (size, -1))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.transpose(0, 1)


@lru_cache(maxsize=4)  # the same for all layers of a micro batch; 8 bytes a token
def shard_order(lengths: Lengths, cp: int, device: torch.device) -> Tensor:
    """Index into the pack of each token, when the ranks' shards are one after the other, int64 [t]."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * cp])
    shards = [shard_indices(cu_seqlens, cp=cp, cp_rank=rank) for rank in range(cp)]
    return to_device([np.concatenate(shards)], device)[0]
