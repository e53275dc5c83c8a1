"""The native back ends of context parallel attention, by the name that `parallel.cp_comm_type` gives them.

    p2p          transports/ring.py    any heads; cp-1 hops overlapped with compute; the default
    all_gather   transports/gather.py  any heads; one collective; all keys of the pack in memory at once
    a2a          transports/heads.py   heads and KV heads divide by cp; whole documents for the kernels

`document_attention` (transports/direct.py) is for packs whose documents lie on some of the ranks
(`parallel.cp_sharding`).

Each is given this rank's zigzag shard and returns the same rows of the same attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.blockwise import KVTransport, LocalKV, attend
from megatron_v2pe.parallel.attention.transports.direct import Direct, Places
from megatron_v2pe.parallel.attention.transports.gather import Gather
from megatron_v2pe.parallel.attention.transports.heads import attend_by_heads
from megatron_v2pe.parallel.attention.transports.ring import Ring


class ContextParallelAttention(Protocol):
    """Causal attention within documents that are spread over ranks, differentiable."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        lengths: Sequence[int],
        scale: float,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [l, h, d], this rank's zigzag shard, documents one after the other.
            key: [l, k, d], rotated like `query`.
            value: [l, k, d].
            lengths: local tokens of each document; on several ranks each must be even (two zigzag chunks).
            scale: factor of the scores.
            group: context parallel ranks; None or a group of one attends locally.

        Returns:
            [l, h, d] in the dtype of `query`.
        """


def _transported_by(transport: Callable[[ProcessGroup], KVTransport]) -> ContextParallelAttention:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        lengths: Sequence[int],
        scale: float,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        chosen = transport(group) if group is not None and group.size() > 1 else LocalKV()
        return attend(query, key, value, lengths=tuple(lengths), scale=scale, transport=chosen)

    return attention


ring_attention = _transported_by(Ring)
gather_attention = _transported_by(Gather)


def head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    group: ProcessGroup | None = None,
) -> Tensor:
    """See `ContextParallelAttention`; heads and KV heads must divide by the ranks."""
    if group is None or group.size() == 1:
        return attend(query, key, value, lengths=tuple(lengths), scale=scale, transport=LocalKV())
    return attend_by_heads(query, key, value, lengths=tuple(lengths), scale=scale, group=group)


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, *, places: Places, scale: float, group: ProcessGroup
) -> Tensor:
    """Causal attention within documents of which each lies on some ranks, differentiable.

    Args:
        query: [l, h, d], what this rank holds of each document, documents one after the other.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        places: which rank holds which documents.
        scale: factor of the scores.
        group: context parallel ranks, at least two.

    Returns:
        [l, h, d] in the dtype of `query`.
    """
    lengths = places.local(group.rank())
    return attend(query, key, value, lengths=lengths, scale=scale, transport=Direct(group, places))


CONTEXT_PARALLEL_ATTENTION: dict[str, ContextParallelAttention] = {
    "p2p": ring_attention,
    "all_gather": gather_attention,
    "a2a": head_attention,
}


def context_parallel_attention(cp_comm_type: str | None) -> ContextParallelAttention:
    """The back end of that name; None is p2p.

    Raises:
        ConfigError: there is no native back end of that name.
    """
    name = "p2p" if cp_comm_type is None else cp_comm_type
    if name not in CONTEXT_PARALLEL_ATTENTION:
        raise ConfigError(
            f"parallel.cp_comm_type is {name!r}, but native attention has {', '.join(CONTEXT_PARALLEL_ATTENTION)}"
        )
    return CONTEXT_PARALLEL_ATTENTION[name]
