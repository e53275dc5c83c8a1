"""Small packs with images, and what each of their tokens should be, by plain loops."""

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.v2pe.layout import PackLayout, SampleLayout, pack_layout

TOKENS_PER_TILE = 4
IMAGE_TOKEN = 9


def sample(spans):
    """A document from spans: 5 = five text tokens, "2@3" = an image of two tiles at stride 3."""
    starts, tiles, strides, length = [], [], [], 0
    for span in spans:
        if isinstance(span, int):
            length += span
            continue
        count, stride = (int(part) for part in span.split("@"))
        starts.append(length)
        tiles.append(count)
        strides.append(stride)
        length += count * TOKENS_PER_TILE
    return SampleLayout(
        num_tokens=length,
        image_starts=np.array(starts, dtype=np.int64),
        num_tiles=np.array(tiles, dtype=np.int64),
        strides=np.array(strides, dtype=np.int64),
        tokens_per_tile=TOKENS_PER_TILE,
    )


def layout_of(documents, *, pad_to_multiple, pack_multiple=1) -> PackLayout:
    """Documents as lists of spans; see `sample`."""
    found = [sample(spans) for spans in documents]
    return pack_layout(found, pad_to_multiple=pad_to_multiple, pack_multiple=pack_multiple)


def feature_rows(layout):
    """Feature row of each token of the pack, -1 for text and padding, counted one by one."""
    rows = np.full(layout.num_tokens, -1)
    next_row = 0
    for document, base in zip(layout.documents, layout.cu_seqlens[:-1], strict=True):
        for start, tiles in zip(document.image_starts, document.num_tiles, strict=True):
            for token in range(base + start, base + start + tiles * TOKENS_PER_TILE):
                rows[token] = next_row
                next_row += 1
    return rows


def units_of(layout):
    """Position units of each token, walked one by one."""
    units = []
    for document, base, end in zip(
        layout.documents, layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True
    ):
        steps = np.full(end - base, TOKENS_PER_TILE)
        for start, tiles, stride in zip(
            document.image_starts, document.num_tiles, document.strides, strict=True
        ):
            steps[start : start + tiles * TOKENS_PER_TILE] = stride
        units.append(np.cumsum(steps) - TOKENS_PER_TILE)
    return np.concatenate(units)


def batch_of(layout, *, tile_range=None, tile_size=2) -> PackedBatch:
    """A pack whose every field is recognisable: token i is i (or IMAGE_TOKEN), its label 1000 + i."""
    length = layout.num_tokens
    index = np.arange(length)
    start, stop = (0, layout.num_tiles) if tile_range is None else tile_range
    tiles = np.arange(start, stop, dtype=np.uint8)[:, None, None, None]
    labels = np.where(index % 3 == 0, IGNORE_INDEX, 1000 + index)
    return PackedBatch(
        tokens=np.where(feature_rows(layout) >= 0, IMAGE_TOKEN, 100 + index),
        labels=labels,
        loss_weights=np.where(labels == IGNORE_INDEX, 0.0, index / 7).astype(np.float32),
        layout=layout,
        num_tiles=layout.num_tiles,
        tile_range=(start, stop),
        tiles=np.broadcast_to(tiles, (stop - start, 3, tile_size, tile_size)).copy(),
        sample_ids=tuple(f"sample-{i}" for i in range(len(layout.documents))),
    )
