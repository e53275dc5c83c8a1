"""Image features are sent once: from the rank that encoded a tile to the ranks that own its tokens.

    tiles in contiguous shares --encode--> features [n_local * K, H] --all-to-all--> rows of my tokens --> splice
                                           (row = tile * K + offset)                 (in token order)

All ranks work out the same route from the layout, so nothing but features is sent. Feature rows are numbered in
token order and every shard keeps documents and zigzag chunks in that order, so the rows a rank receives, rank by
rank, are in the order of its slots already. Backward is the mirror image: gradients are sent back to the encoder.

Every rank of the group must call the router for every micro batch, with rows or without; a collective that one
rank skips hangs the others, in forward or in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.batch.packed_batch import FeatureRoute, tile_share
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout
from megatron_v2pe.v2pe.positions import visual_rows

SlotsAndRows = tuple[Int64Array, Int64Array]


def owned_rows(layout: PackLayout, shards: Sequence[Int64Array], *, plan: ParallelPlan) -> list[SlotsAndRows]:
    """Visual tokens of each rank of the tile group.

    Args:
        layout: documents of the pack.
        shards: token ranges of each context parallel rank (`shards.Shards.ranges`).
        plan: sizes of the parallel axes.

    Returns:
        For each tile rank (cp_rank * tp + tp_rank where tp ranks encode different tiles, else cp_rank):
        slots, int64 [v], rows of the rank's local embedding, ascending; and the feature row of each, int64 [v],
        ascending.
    """
    num_slices = plan.tp if plan.shares_tiles_over_tp else 1
    owned = []
    for ranges in shards:
        slots, rows = visual_rows(layout, ranges)
        length = _num_tokens(ranges) // num_slices
        owned += [_slice(slots, rows, tp_rank, length) for tp_rank in range(num_slices)]
    return owned


def _num_tokens(ranges: Int64Array) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _slice(slots: Int64Array, rows: Int64Array, number: int, length: int) -> SlotsAndRows:
    """Slots and rows of the `number`-th slice of `length` embedding rows; slots count from the slice's start."""
    kept = slice(*np.searchsorted(slots, [number * length, (number + 1) * length]))
    return slots[kept] - number * length, rows[kept]


def feature_route(
    layout: PackLayout,
    shards: Sequence[Int64Array],
    *,
    plan: ParallelPlan,
    tile_rank: int,
    tp_rank: int = 0,
    device: torch.device,
) -> FeatureRoute:
    """What this rank sends to and receives from each rank of the tile group.

    Args:
        layout: documents of the pack.
        shards: token ranges of each context parallel rank (`shards.Shards.ranges`).
        plan: sizes of the parallel axes.
        tile_rank: this rank in the tile group.
        tp_rank: this rank's slice of the sequence, where tp ranks share tiles and sequence parallelism is on.
        device: where the index tensors are needed.
    """
    num_ranks = plan.tile_ranks
    # first_rows[s]..first_rows[s+1] are the feature rows that rank s encodes.
    first_tiles = [tile_share(layout.num_tiles, num_ranks, rank)[0] for rank in range(num_ranks)]
    first_rows = np.array([*first_tiles, layout.num_tiles], dtype=np.int64) * layout.tokens_per_tile
    start, stop = first_rows[tile_rank : tile_rank + 2]
    owned = owned_rows(layout, shards, plan=plan)
    sent = [rows[slice(*np.searchsorted(rows, [start, stop]))] - start for _, rows in owned]
    slots, received = owned[tile_rank]
    arrays = [np.concatenate(sent)]
    if plan.sequence_parallel and not plan.shares_tiles_over_tp:
        numbers = np.arange(len(slots), dtype=np.int64)
        length = _num_tokens(shards[tile_rank]) // plan.tp
        slots, own = _slice(slots, numbers, tp_rank, length)
        arrays.append(own)
    send_rows, slots_there, *kept = to_device([arrays[0], slots, *arrays[1:]], device)
    return FeatureRoute(
        send_rows=send_rows,
        send_splits=tuple(len(rows) for rows in sent),
        receive_splits=tuple(np.diff(np.searchsorted(received, first_rows)).tolist()),
        slots=slots_there,
        kept=kept[0] if kept else None,
    )


class _AllToAll(torch.autograd.Function):
    """Rows to their owners; backward sends gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        """[sum(send), H] to [sum(receive), H]."""
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the received rows to the ranks that sent them."""
        returned = grads[0].new_empty(sum(ctx.send), *grads[0].shape[1:])
        dist.all_to_all_single(
            returned, grads[0].contiguous(), list(ctx.send), list(ctx.receive), group=ctx.group
        )
        return returned, None, None, None


class _KeepSlice(torch.autograd.Function):
    """A tp rank's rows out of rows that all tp ranks hold; backward gives all of them every rank's gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kept: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[received, H] to [v, H]."""
        ctx.save_for_backward(kept)
        ctx.num_rows = len(rows)
        ctx.group = group
        return rows[kept]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Slices do not overlap, so the sum over tp puts them together."""
        (kept,) = ctx.saved_tensors
        whole = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        whole[kept] = grads[0]
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None


class FeatureRouter:
    """The model's routing port: differentiable exchange of feature rows inside the tile group.

    Args:
        group: ranks that share the tiles of a pack (`Ranks.tile_group`).
        tp_group: ranks that share a split tower's tiles; needed where routes keep a slice.
    """

    def __init__(self, group: dist.ProcessGroup, tp_group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.tp_group = tp_group

    def __call__(self, features: Tensor, route: FeatureRoute) -> Tensor:
        """Features [n_local * K, H] of this rank's tiles to rows [v, H] of this rank's slots."""
        rows = features[route.send_rows]
        if self.group.size() > 1:
            rows = _AllToAll.apply(rows, route.send_splits, route.receive_splits, self.group)
        return rows if route.kept is None else _KeepSlice.apply(rows, route.kept, self.tp_group)
