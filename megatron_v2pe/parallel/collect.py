"""Put per-token results of all ranks together, for reports and comparisons; training never needs it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.parallel.zigzag import shard_indices
from megatron_v2pe.v2pe.layout import Int64Array


def gather_tokens(
    local: Tensor | None, *, cu_seqlens: Int64Array, width: tuple[int, ...], cp_size: int, ranks: Ranks
) -> Tensor:
    """Rows of the last stage's context parallel shards in token order, on every rank of the replica.

    Args:
        local: [l, *width] on the last stage (the same on its tp ranks), None elsewhere.
        cu_seqlens: int64 [N+1], padded documents of the pack.
        width: trailing shape of a row.
        cp_size: context parallel size.
        ranks: this rank's place.

    Returns:
        [t, *width] in the dtype of `local`, float32 where it is None.
    """
    whole = torch.zeros(int(cu_seqlens[-1]), *width, device=ranks.device)
    if local is not None:
        whole = whole.to(local.dtype)
        index = torch.from_numpy(shard_indices(cu_seqlens, cp_size=cp_size, cp_rank=ranks.cp_rank))
        whole[index.to(ranks.device)] = local
    dist.all_reduce(whole, group=ranks.groups.cp)
    dist.all_reduce(whole, group=ranks.groups.pp)  # other stages hold zeros
    return whole


def worst_over_ranks(error: float, *, ranks: Ranks) -> float:
    """Largest of all ranks' errors; nan wins over every number."""
    value = torch.tensor(
        [error != error, error if error == error else 0.0], dtype=torch.float64, device=ranks.device
    )
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float("nan") if value[0] else float(value[1])


def from_last_stage(value: Tensor | None, *, shape: tuple[int, ...], ranks: Ranks) -> Tensor:
    """A float32 tensor of the last pipeline stage, on all stages.

    Args:
        value: [*shape] on the last stage, None elsewhere.
        shape: its shape, known to all.
        ranks: this rank's place.
    """
    whole = torch.zeros(shape, device=ranks.device) if value is None else value.float().contiguous()
    group = ranks.groups.pp
    dist.broadcast(whole, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return whole
