"""A pack on its way from the loader to the model: global arrays first, a rank's share after.

    data.loader --PackedBatch--> parallel.batch_sharder --LocalBatch--> models.internvl

Shape legend: t tokens of the pack (padding included), N documents, n tiles, S tile size in pixels,
l local tokens (t / cp, or what documents give), r local rows of the embedding (l, or l / tp with sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_v2pe.batch.kv_cache import CacheStep
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout, blank_layout

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """One micro batch: one pack of documents, in numpy, as the loader makes it.

    Attributes:
        tokens: int64 [t], token ids; padding holds the pad id.
        labels: int64 [t], the target of each token, that is the next token of the same document, or
            IGNORE_INDEX. Shifted here, before any shard is cut.
        loss_weights: float32 [t], weight of each target; 0 where the label is IGNORE_INDEX.
        layout: documents, spans and strides; `layout.cu_seqlens` bounds the padded documents.
        num_tiles: tiles of the whole pack.
        tile_range: half-open range of tiles whose pixels this rank decodes; tiles are numbered over the
            pack in order of appearance.
        tiles: uint8 [n_local, 3, S, S], pixels of `tile_range`; where `tile_sizes` has several, one row for each tile,
            branch after branch (`split_rows`).
        sample_ids: identity of each document, for error messages.
        sources: number of each document's data set in the meta json; empty where it is not needed (prompts, tests).
        damaged: (document, message) of each document one of whose images this rank could not read; its tiles
            are black. Ranks that read other images do not know of it before they agree (`train.guards.damaged`).
        tile_sizes: pixels of a tile's side in every branch of a pyramid (PIIP); empty for one size.
        blank: those of `damaged` whose text this rank could not read either; see `blanked`.
    """

    tokens: Int64Array
    labels: Int64Array
    loss_weights: NDArray[np.float32]
    layout: PackLayout
    num_tiles: int
    tile_range: tuple[int, int]
    tiles: NDArray[np.uint8]
    sample_ids: tuple[str, ...]
    sources: tuple[int, ...] = ()
    damaged: tuple[tuple[int, str], ...] = ()
    blank: frozenset[int] = frozenset()
    tile_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureRoute:
    """How feature rows are sent from the ranks that encode tiles to the ranks that own the tokens.

    Attributes:
        send_rows: int64 [sent], rows of the local features (tile-major) in order of destination rank.
        send_splits: rows sent to each rank of the routing group.
        receive_splits: rows received from each rank of the routing group.
        slots: int64 [v], row of the local embedding that each row replaces.
        kept: int64 [v], received rows that belong to this rank's slice of the sequence, where all tp ranks
            receive the rows of their whole cp shard (split vision tower with sequence parallelism); else None
            and v = received.
    """

    send_rows: Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    slots: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalBatch:
    """A rank's share of a micro batch, as tensors on its device.

    Attributes:
        tokens: int64 [1, l].
        labels: int64 [1, l], shifted before the cut.
        loss_weights: float32 [1, l].
        position_units: int64 [l], positions in units of 1/tokens_per_tile.
        rope_length: largest whole position of the whole pack plus one.
        cu_seqlens: int32 [N+1], global padded document boundaries.
        max_seqlen: longest padded document in tokens, global.
        document_lengths: padded tokens of each document, global, on the host; empty reads them from `cu_seqlens`.
        document_holders: for each document the context parallel ranks that hold it; None where all hold a part.
        local_lengths: padded tokens of each document on this rank; empty where nobody asks (prompts).
        has_fractions: some position is not whole; None where the device has to be asked.
        supervised: int64 [u], local tokens with a label; None where the device has to be asked.
        pixels: [n_local, *tile_shape] normalised tiles of this rank in the model's dtype; None on ranks
            that hold no vision tower.
        route: how the features of the pack reach this rank's tokens; None where `pixels` is None.
        kv_cache: what is done with keys and values of earlier tokens, in generation only.
        is_token: bool [l], false for padding; None where nobody asks (prompts).
        pack_weight: float64 [], loss weight of the whole pack; None with `is_token`.
    """

    tokens: Tensor
    labels: Tensor | None
    loss_weights: Tensor | None
    position_units: Tensor
    rope_length: int
    cu_seqlens: Tensor
    max_seqlen: int
    pixels: Tensor | None
    route: FeatureRoute | None
    document_lengths: tuple[int, ...] = ()
    document_holders: tuple[tuple[int, ...], ...] | None = None
    local_lengths: tuple[int, ...] = ()
    has_fractions: bool | None = None
    supervised: Tensor | None = None
    kv_cache: CacheStep | None = None
    is_token: Tensor | None = None
    pack_weight: Tensor | None = None


def without_loss(batch: PackedBatch, documents: Collection[int]) -> PackedBatch:
    """The pack with labels and loss weights of some documents removed."""
    if not documents:
        return batch
    labels, weights = batch.labels.copy(), batch.loss_weights.copy()
    for start, end in _bounds(batch, documents):
        labels[start:end] = IGNORE_INDEX
        weights[start:end] = 0.0
    return replace(batch, labels=labels, loss_weights=weights)


def blanked(batch: PackedBatch, documents: Collection[int]) -> PackedBatch:
    """The pack with some documents made blank: their lengths and tiles stay, all else is the same on every rank.

    A rank that could not read a document's text does not know where its images are, so ranks that share the pack
    must all drop it, or features would be sent to ranks that do not expect them.
    """
    if not documents:
        return batch
    tokens, layouts = batch.tokens.copy(), list(batch.layout.documents)
    for start, end in _bounds(batch, documents):
        tokens[start:end] = 0
    for document in documents:
        known = layouts[document]
        layouts[document] = blank_layout(
            known.num_tokens, num_tiles=known.total_tiles, tokens_per_tile=known.tokens_per_tile
        )
    layout = replace(batch.layout, documents=tuple(layouts))
    return without_loss(replace(batch, tokens=tokens, layout=layout), documents)


def _bounds(batch: PackedBatch, documents: Collection[int]) -> list[tuple[int, int]]:
    bounds = batch.layout.cu_seqlens.tolist()
    return [(bounds[document], bounds[document + 1]) for document in documents]


def tile_share(num_tiles: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Contiguous share of a rank when tiles are split evenly: counts differ by at most one.

    Example: 7 tiles over 3 ranks are [0, 3), [3, 5), [5, 7).
    """
    share, rest = divmod(num_tiles, num_ranks)
    start = rank * share + min(rank, rest)
    return start, start + share + (rank < rest)


def tile_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one normalised tile: [3, S, S], or with several sizes one row, branch after branch."""
    if len(sizes) == 1:
        return (3, sizes[0], sizes[0])
    return (sum(3 * size * size for size in sizes),)


def split_rows(rows: NDArray[np.uint8], sizes: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    """Rows of tiles in several sizes as views uint8 [n, 3, S_b, S_b], whose channels lie together in memory."""
    views, start = [], 0
    for size in sizes:
        stop = start + 3 * size * size
        views.append(rows[:, start:stop].reshape(len(rows), size, size, 3).transpose(0, 3, 1, 2))
        start = stop
    return views


def normalized(rows: Tensor, norm: PixelNorm, sizes: tuple[int, ...]) -> Tensor:
    """uint8 tiles to float32: [n, 3, S, S] as `normalize_tiles` gives them; rows of several sizes to such rows.

    Within a row each size comes with its channels last and leaves with its channels first.
    """
    if len(sizes) < 2:
        return normalize_tiles(rows, norm)
    parts = rows.split([3 * size * size for size in sizes], dim=1)
    return torch.cat(
        [
            normalize_tiles(part.reshape(-1, size, size, 3).permute(0, 3, 1, 2), norm).flatten(1)
            for part, size in zip(parts, sizes, strict=True)
        ],
        dim=1,
    )


def normalize_tiles(tiles: Tensor, norm: PixelNorm) -> Tensor:
    """uint8 [n, 3, S, S] to float32 (x/255 - mean) / std, channel by channel, as the release's transform."""
    mean, std = _channel_tables(norm, tiles.device) if tiles.is_cuda else _channels(norm, tiles.device)
    return tiles.to(torch.float32).div_(255.0).sub_(mean).div_(std)


def _channels(norm: PixelNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [1, 3, 1, 1]."""
    numbers = (torch.tensor(values, dtype=torch.float32, device=device) for values in (norm.mean, norm.std))
    mean, std = (values.view(1, 3, 1, 1) for values in numbers)
    return mean, std


_channel_tables = lru_cache(maxsize=8)(_channels)  # a copy to the GPU makes the host wait; once is enough
