r"""Cut a pack for one rank: one index for every per-token field, positions evaluated at the same index.

    PackedBatch [t] --shard_ranges(cp)--> tokens, labels, loss weights [l]     (labels were shifted before)
                                      \-> position units [l]                  (closed form, nothing of length t)
                                      \-> slots and route of image features
    tiles of this rank, uint8 --device--> normalised pixels

This is the only place where a pack becomes a rank's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_v2pe.batch.packed_batch import LocalBatch, PackedBatch, deal_tiles, normalize_tiles
from megatron_v2pe.parallel.feature_router import feature_route
from megatron_v2pe.parallel.topology import ParallelPlan, Ranks
from megatron_v2pe.parallel.zigzag import shard_indices, shard_ranges
from megatron_v2pe.v2pe.positions import position_units


def shard_batch(
    batch: PackedBatch,
    *,
    plan: ParallelPlan,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    encodes_tiles: bool | None = None,
) -> LocalBatch:
    """This rank's share of a micro batch.

    Args:
        batch: the pack, the same on all ranks of a model replica but for the tiles.
        plan: sizes of the parallel axes.
        ranks: this rank's place.
        device: where the tensors are needed.
        dtype: dtype of the pixels, the model's.
        mean: channel means of the pixel normalisation.
        std: channel standard deviations.
        encodes_tiles: pixels and route are wanted; by default on the first pipeline stage. Of a rank's virtual
            stages only the first wants them.

    Raises:
        ValueError: the pack holds pixels of other tiles than the ones dealt to this rank.
    """
    layout = batch.layout
    cut = dict(cp=plan.cp, cp_rank=ranks.cp_rank)
    index = shard_indices(layout.cu_seqlens, **cut)
    units = position_units(layout, shard_ranges(layout.cu_seqlens, **cut))
    lengths = layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]
    pixels, route = None, None
    if ranks.is_first_stage if encodes_tiles is None else encodes_tiles:
        _check_share(batch, plan=plan, tile_rank=ranks.tile_rank)
        tiles = torch.from_numpy(batch.tiles).to(device).contiguous()  # channels lay together in memory
        pixels = _pixels(tiles, mean=mean, std=std).to(dtype)
        route = feature_route(
            layout, plan=plan, tile_rank=ranks.tile_rank, tp_rank=ranks.tp_rank, device=device
        )
    return LocalBatch(
        tokens=torch.from_numpy(batch.tokens[index]).to(device).unsqueeze(0),
        labels=torch.from_numpy(batch.labels[index]).to(device).unsqueeze(0),
        loss_weights=torch.from_numpy(batch.loss_weights[index]).to(device).unsqueeze(0),
        position_units=torch.from_numpy(units).to(device),
        rope_length=layout.rope_length,
        cu_seqlens=torch.from_numpy(layout.cu_seqlens).to(device=device, dtype=torch.int32),
        max_seqlen=int(lengths.max()),
        pixels=pixels,
        route=route,
    )


def _check_share(batch: PackedBatch, *, plan: ParallelPlan, tile_rank: int) -> None:
    """The route assumes this share; features of other tiles would arrive at the wrong tokens unnoticed."""
    share = deal_tiles(batch.layout.num_tiles, plan.tile_ranks, tile_rank)
    if len(batch.tiles) and batch.tile_range != share:
        raise ValueError(
            f"samples {list(batch.sample_ids)}: tiles {batch.tile_range} were decoded, but rank {tile_rank} of "
            f"{plan.tile_ranks} encodes {share}; deal tiles by deal_tiles with the plan's tile_ranks"
        )


def _pixels(tiles: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels as the model wants them; float tiles are normalised already (golden cases)."""
    return normalize_tiles(tiles, mean=mean, std=std) if tiles.dtype == torch.uint8 else tiles
