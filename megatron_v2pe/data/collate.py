"""Documents to one pack: shifted labels, loss weights, padding per document, this rank's pixels.

    document   tokens  a b c d        labels (unshifted)  . . c d
    pack       tokens  a b c d p p    labels              . c d . . .     weights  0 w w 0 0 0

Labels are shifted here, inside each document, so that whatever is cut later (context parallel shards) keeps
every pair of token and target; the release shifts after the cut and loses the pair at each edge of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.medium import load_tile_range
from megatron_v2pe.data.samples.encode import EncodedSample
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout, pack_layout

_EXPONENTS = {"token": 0.0, "square": -0.5, "sample": -1.0}


def token_weights(labels: Int64Array, *, loss_reduction: str) -> NDArray[np.float32]:
    """Weight of each supervised token of one sample.

    Args:
        labels: int64 [t], unshifted labels of the whole sample.
        loss_reduction: `token`, `sample` or `square`: 1, 1/x or 1/sqrt(x) for x supervised tokens.

    Returns:
        float32 [t], 0 where the label is IGNORE_INDEX.
    """
    supervised = labels != IGNORE_INDEX
    weights = np.zeros(len(labels), dtype=np.float32)
    if supervised.any():
        weights[supervised] = float(supervised.sum()) ** _EXPONENTS[loss_reduction]
    return weights


def shift_left(values: NDArray, *, fill: float) -> NDArray:
    """The value at t+1 moves to t; the last place is filled. Same shape and dtype."""
    return np.append(values[1:], np.asarray(fill, dtype=values.dtype))


def collate_pack(
    samples: Sequence[EncodedSample],
    *,
    pad_to_multiple: int,
    pack_multiple: int = 1,
    pad_token_id: int,
    loss_reduction: str,
    image_size: int,
    smaller_sizes: tuple[int, ...] = (),
    tile_range_of: Callable[[int], tuple[int, int]] = lambda num_tiles: (0, num_tiles),
    tolerate_damage: bool = False,
) -> PackedBatch:
    """Make one micro batch of documents.

    Args:
        samples: the documents, in order.
        pad_to_multiple: each document is padded to a multiple of this many tokens.
        pack_multiple: the last document is padded further, until the pack is a multiple of this many.
        pad_token_id: token of the padding; never supervised.
        loss_reduction: see `token_weights`.
        image_size: tile size S in pixels.
        smaller_sizes: pixels of a tile's side in the smaller branches of a pyramid, which see it larger.
        tile_range_of: tiles of the pack -> half-open range whose pixels are wanted; only the images of that
            range are opened.
        tolerate_damage: an image that cannot be read becomes black tiles and an entry of `damaged`. Blank samples
            are entries of it in any case.

    Returns:
        the pack, with uint8 pixels of the wanted tiles.

    Raises:
        DataError: nothing in the pack is supervised (the loss would be 0/0) and no sample is blank, or an image
            cannot be read and damage is not tolerated.
    """
    layout = pack_layout(
        [sample.layout for sample in samples], pad_to_multiple=pad_to_multiple, pack_multiple=pack_multiple
    )
    tokens, labels, weights = _token_arrays(
        samples, layout, pad_token_id=pad_token_id, loss_reduction=loss_reduction
    )
    sample_ids = tuple(sample.sample_id for sample in samples)
    damaged = {number: sample.damage for number, sample in enumerate(samples) if sample.damage}
    if not damaged:
        _check_supervised(weights, sample_ids)
    tile_range = tile_range_of(layout.num_tiles)
    load = partial(load_tile_range, image_size=image_size, smaller_sizes=smaller_sizes, tile_range=tile_range)
    tiles = _tiles(samples, load, damaged=damaged if tolerate_damage else None)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        loss_weights=weights,
        layout=layout,
        num_tiles=layout.num_tiles,
        tile_range=tile_range,
        tiles=tiles,
        sample_ids=sample_ids,
        damaged=tuple(damaged.items()),
        blank=frozenset(damaged),
        tile_sizes=(image_size, *smaller_sizes) if smaller_sizes else (),
    )


def _tiles(
    samples: Sequence[EncodedSample],
    load: Callable[..., NDArray[np.uint8]],
    *,
    damaged: dict[int, str] | None,
) -> NDArray[np.uint8]:
    """Pixels of the tiles that `load` reads of a list of media.

    Images that cannot be read are noted by document in `damaged`, where it is given.
    """
    media = [medium for sample in samples for medium in sample.media]
    document_of = [number for number, sample in enumerate(samples) for _ in sample.media]

    def note(medium: int, error: DataError) -> None:
        assert damaged is not None
        damaged.setdefault(document_of[medium], str(error))

    on_damage = None if damaged is None else note
    return load(media, on_damage=on_damage)


def _check_supervised(weights: NDArray[np.float32], sample_ids: tuple[str, ...]) -> None:
    if not weights.any():
        raise DataError(
            f"samples {', '.join(sample_ids)}: no token of this pack is supervised, so its loss is not defined; "
            "remove samples without an answer"
        )


def _token_arrays(
    samples: Sequence[EncodedSample], layout: PackLayout, *, pad_token_id: int, loss_reduction: str
) -> tuple[Int64Array, Int64Array, NDArray[np.float32]]:
    """Tokens, shifted labels and their weights of all documents, each [t]."""
    tokens = np.full(layout.num_tokens, pad_token_id, dtype=np.int64)
    labels = np.full(layout.num_tokens, IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros(layout.num_tokens, dtype=np.float32)
    for sample, start in zip(samples, layout.cu_seqlens[:-1].tolist(), strict=True):
        end = start + len(sample.tokens)
        tokens[start:end] = sample.tokens
        labels[start:end] = shift_left(sample.labels, fill=IGNORE_INDEX)
        weights[start:end] = shift_left(token_weights(sample.labels, loss_reduction=loss_reduction), fill=0.0)
    return tokens, labels, weights
