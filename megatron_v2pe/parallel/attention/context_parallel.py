"""The native back ends of context parallel attention, by the name that `parallel.cp_comm_type` gives them.

    p2p          transports/ring.py    any heads; cp-1 hops overlapped with compute; the default
    all_gather   transports/gather.py  any heads; one collective; all keys of the pack in memory at once
    a2a          transports/heads.py   heads and KV heads divide by cp; whole documents for the kernels

`document_attention` (transports/direct.py) is for packs whose documents lie on some of the ranks
(`parallel.cp_sharding`). Layers with a sliding window exchange the few keys that it reaches (transports/halo.py) in the
place of p2p, all_gather and direct; a2a gives them whole documents.

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
from megatron_v2pe.parallel.attention.transports.halo import Halo, document_halo, zigzag_halo
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
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [l, h, d], this rank's zigzag shard, documents one after the other.
            key: [l, k, d], rotated like `query`.
            value: [l, k, d].
            lengths: local tokens of each document; on several ranks each must be even (two zigzag chunks).
            scale: factor of the scores.
            group: context parallel ranks; None or a group of one attends locally.
            window: newest tokens of its document that a query sees, itself included; None for all.
            sink: [h], an extra logit of each query head that joins the softmax and has no value; None for none.

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
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        lengths = tuple(lengths)
        chosen: KVTransport
        if group is None or group.size() == 1:
            chosen = LocalKV(window)
        elif window is None:
            chosen = transport(group)
        else:
            where = dict(cp=group.size(), rank=group.rank())
            chosen = Halo(zigzag_halo(lengths, **where, window=window, device=query.device), group)
        return attend(query, key, value, lengths=lengths, scale=scale, transport=chosen, sink=sink)

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
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """See `ContextParallelAttention`; heads and KV heads must divide by the ranks."""
    lengths, local = tuple(lengths), LocalKV(window)
    if group is None or group.size() == 1:
        return attend(query, key, value, lengths=lengths, scale=scale, transport=local, sink=sink)
    return attend_by_heads(
        query, key, value, lengths=lengths, scale=scale, group=group, transport=local, sink=sink
    )


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    places: Places,
    scale: float,
    group: ProcessGroup,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents of which each lies on some ranks, differentiable.

    Args:
        query: [l, h, d], what this rank holds of each document, documents one after the other.
        key: [l, k, d], rotated like `query`.
        value: [l, k, d].
        places: which rank holds which documents.
        scale: factor of the scores.
        group: context parallel ranks, at least two.
        window: as in `ContextParallelAttention`.
        sink: as in `ContextParallelAttention`.

    Returns:
        [l, h, d] in the dtype of `query`.
    """
    chosen: KVTransport = Direct(group, places)
    if window is not None:
        where = dict(cp=group.size(), rank=group.rank())
        chosen = Halo(document_halo(places, **where, window=window, device=query.device), group)
    lengths = places.local(group.rank())
    return attend(query, key, value, lengths=lengths, scale=scale, transport=chosen, sink=sink)


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
