"""Features of a prefill chunk's tiles on their way to the tokens, with those of a tile that a cut went through.

    features on a rank    [ carried tile ][ new tiles ]  --all-to-all-->  rows of my tokens  --> splice

All ranks work out the same route from the chunk, so nothing but features is sent. The router keeps the features of
the last tile where the next chunk needs them, and drops everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.batch.packed_batch import FeatureRoute
from megatron_v2pe.inference.chunks import PrefillChunk
from megatron_v2pe.parallel.feature_router import FeatureRouter
from megatron_v2pe.parallel.zigzag import shard_ranges
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout, SampleLayout
from megatron_v2pe.v2pe.positions import visual_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkRoute(FeatureRoute):
    """A route whose `send_rows` count over the carried tile's rows, if there are any, and the new tiles'.

    Attributes:
        starts_prompt: nothing is carried into the first chunk, whatever was left by another prompt.
        kept_tail: rows at the end of the features that the next chunk needs from this rank.
    """

    starts_prompt: bool
    kept_tail: int


@dataclass(frozen=True, kw_only=True)
class TileRanks:
    """Ranks that share the tiles of a prompt.

    Attributes:
        size: how many.
        rank: this one; cp_rank * (size / cp) + the rest.
        cp: context parallel ranks among them.
    """

    size: int
    rank: int
    cp: int

    def cp_rank_of(self, rank: int) -> int:
        """Context parallel rank of a rank of the tile group."""
        return rank // (self.size // self.cp)


def chunk_ranges(chunk: PrefillChunk, *, cp: int, cp_rank: int) -> Int64Array:
    """Token ranges of the prompt that a rank holds of a chunk, padding after the prompt included; int64 [R, 2]."""
    cut = shard_ranges(np.array([0, chunk.padded], dtype=np.int64), cp=cp, cp_rank=cp_rank)
    return cut + chunk.start


def chunk_pack(layout: SampleLayout, chunk: PrefillChunk) -> PackLayout:
    """The prompt as a pack that is long enough for the chunk's padding."""
    end = max(layout.num_tokens, chunk.start + chunk.padded)
    cu_seqlens = np.array([0, end], dtype=np.int64)
    return PackLayout(documents=(layout,), cu_seqlens=cu_seqlens, tokens_per_tile=layout.tokens_per_tile)


def chunk_route(
    layout: SampleLayout, chunk: PrefillChunk, *, tiles: TileRanks, is_first: bool, device: torch.device
) -> ChunkRoute:
    """What this rank sends and receives for a chunk.

    Args:
        layout: of the prompt.
        chunk: the chunk.
        tiles: ranks that share its tiles.
        is_first: the first chunk of this prefill.
        device: where the index tensors are needed.
    """
    per_tile, pack = layout.tokens_per_tile, chunk_pack(layout, chunk)
    numbers = range(chunk.first_tile, chunk.last_tile)
    owner_of_tile = np.array([chunk.owner_of(tile, tiles.size) for tile in numbers], dtype=np.int64)
    is_mine = owner_of_tile == tiles.rank
    place = (np.cumsum(is_mine) - is_mine) * per_tile  # of a tile's rows in my features
    owned = {}
    for cp_rank in range(tiles.cp):
        slots, rows = visual_rows(pack, chunk_ranges(chunk, cp=tiles.cp, cp_rank=cp_rank))
        owned[cp_rank] = slots, rows, owner_of_tile[rows // per_tile - chunk.first_tile]
    sent = []
    for rank in range(tiles.size):
        _, rows, owners = owned[tiles.cp_rank_of(rank)]
        mine = rows[owners == tiles.rank]
        sent.append(place[mine // per_tile - chunk.first_tile] + mine % per_tile)
    slots, _, owners = owned[tiles.cp_rank_of(tiles.rank)]
    order = np.argsort(owners, kind="stable")  # rows arrive rank by rank
    keeps = chunk.is_cut and owner_of_tile[-1] == tiles.rank
    return ChunkRoute(
        send_rows=torch.from_numpy(np.concatenate(sent)).to(device),
        send_splits=tuple(len(part) for part in sent),
        receive_splits=tuple(int((owners == rank).sum()) for rank in range(tiles.size)),
        slots=torch.from_numpy(slots[order]).to(device),
        starts_prompt=is_first,
        kept_tail=per_tile if keeps else 0,
    )


class ChunkRouter:
    """The model's routing port in prefill.

    Args:
        group: ranks that share tiles.
    """

    def __init__(self, group: Any) -> None:
        self._send = FeatureRouter(group)
        self._carried: Tensor | None = None

    def __call__(self, features: Tensor, route: FeatureRoute) -> Tensor:
        """Features [n*K, H] of the new tiles to rows [v, H] of this rank's tokens."""
        assert isinstance(route, ChunkRoute)
        if self._carried is not None and not route.starts_prompt:
            features = torch.cat([self._carried.to(features.dtype), features])
        self._carried = features[-route.kept_tail :].clone() if route.kept_tail else None
        return self._send(features, route)
