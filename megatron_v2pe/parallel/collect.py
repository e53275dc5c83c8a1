"""Gather per-token and per-tile results of all ranks, for reports and comparisons; training never needs it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.packed_batch import tile_share
from megatron_v2pe.parallel.topology import ParallelContext, Ranks
from megatron_v2pe.parallel.zigzag import shard_indices
from megatron_v2pe.v2pe.layout import Int64Array


def gather_tokens(
    local: Tensor | None, *, cu_seqlens: Int64Array, width: tuple[int, ...], context: ParallelContext
) -> Tensor:
    """Rows of one stage's context parallel shards in token order, on every rank of the replica.

    Args:
        local: [l, *width] on the stage that has them (the same on its tp ranks), None elsewhere.
        cu_seqlens: int64 [N+1], padded documents of the pack.
        width: trailing shape of a row.
        context: context parallel size, and this rank's place.

    Returns:
        [t, *width] in the dtype of `local`, float32 where it is None.
    """
    plan, ranks = context.plan, context.ranks
    whole = torch.zeros(int(cu_seqlens[-1]), *width, device=ranks.device)
    if local is not None:
        whole = whole.to(local.dtype)
        index = torch.from_numpy(shard_indices(cu_seqlens, cp=plan.cp, cp_rank=ranks.cp_rank))
        whole[index.to(ranks.device)] = local
    dist.all_reduce(whole, group=ranks.groups.cp)
    dist.all_reduce(whole, group=ranks.groups.pp)  # other stages hold zeros
    return whole


def gather_slices(local: Tensor, *, ranks: Ranks) -> Tensor:
    """Rows [r, ...] that sequence parallelism split over tp, as [r * tp, ...] on each of the tp ranks."""
    group = ranks.groups.tp
    slices = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(slices, local.contiguous(), group=group)
    return torch.cat(slices)


def gather_tiles(
    local: Tensor | None, *, num_tiles: int, width: tuple[int, ...], context: ParallelContext
) -> Tensor:
    """What ranks of the first stage made of their tiles, in the order of the pack, on every rank of the replica.

    Args:
        local: [n_local, *width] on the first stage, None elsewhere; rows after this rank's share are left out.
        num_tiles: tiles of the pack.
        width: trailing shape of a tile's result.
        context: ranks that share the tiles, and this rank's place.

    Returns:
        float32 [num_tiles, *width].
    """
    ranks = context.ranks
    whole = torch.zeros(num_tiles, *width, device=ranks.device)
    if local is not None:
        start, stop = tile_share(num_tiles, context.plan.tile_ranks, ranks.tile_rank)
        whole[start:stop] = local[: stop - start].float()
    dist.all_reduce(whole, group=ranks.tile_group)
    dist.all_reduce(whole, group=ranks.groups.pp)  # other stages hold zeros
    return whole


def max_error_over_ranks(error: float, *, ranks: Ranks) -> float:
    """Largest of all ranks' errors; NaN where one is NaN. Collective over the world."""
    value = torch.tensor(
        [error != error, error if error == error else 0.0], dtype=torch.float64, device=ranks.device
    )
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float("nan") if value[0] else float(value[1])


def from_owner(value: Tensor | None, *, shape: tuple[int, ...], ranks: Ranks) -> Tensor:
    """A tensor that one pipeline stage and context parallel rank of the replica has, as float32 on all its ranks.

    Args:
        value: [*shape] on the owner (and its tp ranks), None elsewhere.
        shape: its shape, known to all.
        ranks: this rank's place.
    """
    whole = torch.zeros(shape, device=ranks.device) if value is None else value.float().contiguous()
    for group in (ranks.groups.cp, ranks.groups.pp):
        if group.size() > 1:
            dist.all_reduce(whole, group=group)  # adds zeros, so the owner's bits arrive
    return whole
