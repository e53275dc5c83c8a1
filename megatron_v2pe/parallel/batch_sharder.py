r"""Cut a pack for one rank: one index for every per-token field, positions evaluated at the same index.

    PackedBatch [t] --Sharding.shards(cp)--> tokens, labels, loss weights [l]     (labels were shifted before)
                                      \-> position units [l]                  (closed form, nothing of length t)
                                      \-> slots and route of image features
    tiles of this rank, uint8 --device--> normalised pixels

This is the only place where a pack becomes a rank's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.batch.packed_batch import LocalBatch, PackedBatch, normalized, tile_share
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.parallel.feature_router import feature_route
from megatron_v2pe.parallel.shards import ZIGZAG, Sharding
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.parallel.zigzag import range_indices
from megatron_v2pe.v2pe.positions import position_units


@dataclass(frozen=True, kw_only=True)
class BatchSharder:
    """Cuts packs for this rank; tensors are made on its device.

    Attributes:
        context: sizes of the parallel axes and this rank's place on them.
        dtype: dtype of the pixels, the model's.
        norm: normalisation of uint8 tiles; None where tiles come as normalised floats.
        sharding: which rank holds which tokens.
    """

    context: ParallelContext
    dtype: torch.dtype
    norm: PixelNorm | None = None
    sharding: Sharding = ZIGZAG

    def shard(self, batch: PackedBatch, *, encodes_tiles: bool | None = None) -> LocalBatch:
        """This rank's share of a micro batch.

        Args:
            batch: the pack, the same on all ranks of a model replica but for the tiles.
            encodes_tiles: pixels and route are wanted; by default on the first pipeline stage. Of a rank's virtual
                stages only the first wants them.

        Raises:
            ValueError: the pack holds pixels of other tiles than this rank encodes, or uint8 tiles and no `norm`.
        """
        plan, ranks = self.context.plan, self.context.ranks
        layout, device = batch.layout, ranks.device
        shards = self.sharding.shards(layout.cu_seqlens, cp=plan.cp)
        own = shards.ranges[ranks.cp_rank]
        index = range_indices(own)
        pixels, route = None, None
        if ranks.is_first_stage if encodes_tiles is None else encodes_tiles:
            pixels = self._pixels(batch)
            route = feature_route(
                layout,
                shards.ranges,
                plan=plan,
                tile_rank=ranks.tile_rank,
                tp_rank=ranks.tp_rank,
                device=device,
            )
        positions = position_units(layout, own)
        labels = batch.labels[index]
        tokens, labels_there, loss_weights, units, cu_seqlens, supervised, is_token, weight = to_device(
            [
                batch.tokens[index],
                labels,
                batch.loss_weights[index],
                positions,
                layout.cu_seqlens.astype(np.int32),
                np.flatnonzero(labels >= 0),
                layout.is_token(index),
                np.asarray(batch.loss_weights.sum(dtype=np.float64)),
            ],
            device,
        )
        return LocalBatch(
            tokens=tokens.unsqueeze(0),
            labels=labels_there.unsqueeze(0),
            loss_weights=loss_weights.unsqueeze(0),
            position_units=units,
            rope_length=layout.rope_length,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(shards.lengths),
            document_lengths=shards.lengths,
            document_holders=shards.holders,
            local_lengths=shards.local_lengths(ranks.cp_rank),
            has_fractions=bool((positions % layout.tokens_per_tile).any()),
            supervised=supervised,
            pixels=pixels,
            route=route,
            is_token=is_token,
            pack_weight=weight,
        )

    def rows(self, batch: PackedBatch) -> int:
        """Rows of a pack between the layers of this rank, and of all that it exchanges hidden states with (r)."""
        plan, cp_rank = self.context.plan, self.context.ranks.cp_rank
        tokens = self.sharding.shards(batch.layout.cu_seqlens, cp=plan.cp).tokens(cp_rank)
        return tokens // (plan.tp if plan.sequence_parallel else 1)

    def _pixels(self, batch: PackedBatch) -> Tensor:
        """Normalised tiles of this rank [n_local, *tile_shape] in the model's dtype."""
        self._check_tiles(batch)
        device = self.context.ranks.device
        if batch.tile_sizes:
            (tiles,) = to_device([batch.tiles], device)
        else:  # copied as they lie in memory, channels last
            (tiles,) = to_device([batch.tiles.transpose(0, 2, 3, 1)], device)
            tiles = tiles.permute(0, 3, 1, 2).contiguous()
        if tiles.dtype == torch.uint8 and self.norm is not None:
            tiles = normalized(tiles, self.norm, batch.tile_sizes)
        elif tiles.dtype == torch.uint8 and len(tiles):
            raise ValueError(
                "the pack holds uint8 tiles, but this BatchSharder has no PixelNorm; give it one"
            )
        return tiles.to(self.dtype)

    def _check_tiles(self, batch: PackedBatch) -> None:
        """The route assumes this share; features of other tiles would arrive at the wrong tokens unnoticed."""
        num_ranks, tile_rank = self.context.plan.tile_ranks, self.context.ranks.tile_rank
        share = tile_share(batch.layout.num_tiles, num_ranks, tile_rank)
        if len(batch.tiles) and batch.tile_range != share:
            raise ValueError(
                f"samples {list(batch.sample_ids)}: tiles {batch.tile_range} were decoded, but rank {tile_rank} of "
                f"{num_ranks} encodes {share}; assign tiles by tile_share with the plan's tile_ranks"
            )
