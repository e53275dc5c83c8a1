"""Position of any token, from the layout alone, as an exact integer.

The paper's rule (V2PE, section 3; release: `get_rope_pos_id`): a text token advances the position by 1,
a visual token by delta = stride/T. In units of 1/T both steps are integers, T and stride, so a position
is an int64 count that is exact at any length; float32 cannot separate steps of 1/256 above 65,536.

    tokens     t    t    <img>  v    v    v    v    </img>  t          (T = 4, stride 2)
    units      0    4    8      10   12   14   16   20      24

A shard of a long sequence is a few contiguous ranges of tokens. Inside a range the units are a running
sum of steps, so cost and memory follow the local tokens and the images they touch, never the sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.v2pe.layout import Int64Array, PackLayout, SampleLayout


def _fill_range(layout: SampleLayout, start: int, stop: int, out: Int64Array) -> None:
    """Write the units of tokens start..stop-1 of one document (padding allowed) into out [stop-start]."""
    tokens_per_tile = layout.tokens_per_tile
    lengths = layout.num_tiles * tokens_per_tile
    ends = layout.image_starts + lengths
    first = int(np.searchsorted(ends, start, side="right"))  # first image that ends after start
    last = int(
        np.searchsorted(layout.image_starts, stop, side="left")
    )  # first image that starts at stop or later

    # Steps into each token of the range; text steps are T, visual tokens step by their stride.
    out[:] = tokens_per_tile
    for image in range(first, last):
        low = max(int(layout.image_starts[image]), start) - start
        high = min(int(ends[image]), stop) - start
        out[low:high] = layout.strides[image]

    # Units of the first token: one step for every token up to and including it, minus the first step,
    # because the walk starts at 0 (or at stride/T, if the document begins with a visual token).
    units = (start + 1) * tokens_per_tile - tokens_per_tile
    before = slice(0, first)
    units -= int((lengths[before] * (tokens_per_tile - layout.strides[before])).sum())
    if first < layout.num_images and layout.image_starts[first] <= start:
        inside = start - int(layout.image_starts[first]) + 1
        units -= inside * (tokens_per_tile - int(layout.strides[first]))
    out[0] = units
    np.cumsum(out, out=out)


def position_units(layout: PackLayout, ranges: Int64Array | None = None) -> Int64Array:
    """Positions of the tokens in `ranges`, in units of 1/tokens_per_tile.

    Args:
        layout: documents of the pack.
        ranges: int64 [R, 2], half-open token ranges of the pack (a rank's shard); None is the whole
            pack. A range must not cross a document's end; padding tokens are allowed and continue by
            whole steps.

    Returns:
        int64 [sum of range lengths]. `units / tokens_per_tile` is the position of the paper.

    Example:
        T = 4, one document of 5 text tokens (the last is `<img>`), one tile at stride 1, `</img>`:
        units 0 4 8 12 16 | 17 18 19 20 | 24.
    """
    if ranges is None:
        ranges = np.stack([layout.cu_seqlens[:-1], layout.cu_seqlens[1:]], axis=1)
    out = np.empty(int((ranges[:, 1] - ranges[:, 0]).sum()), dtype=np.int64)
    owners = np.searchsorted(layout.cu_seqlens, ranges[:, 0], side="right") - 1
    written = 0
    for (start, stop), owner in zip(ranges.tolist(), owners.tolist(), strict=True):
        if start == stop:
            continue
        base = int(layout.cu_seqlens[owner])
        if stop > int(layout.cu_seqlens[owner + 1]):
            raise ValueError(f"range {start}..{stop} crosses the end of document {owner}")
        _fill_range(layout.documents[owner], start - base, stop - base, out[written : written + stop - start])
        written += stop - start
    return out


def visual_rows(layout: PackLayout, ranges: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Which tokens of a shard are visual, and the feature row of each of them.

    Feature rows are numbered over the pack: row = tile * tokens_per_tile + offset, with tiles counted
    in order of appearance.

    Args:
        layout: documents of the pack.
        ranges: int64 [R, 2], half-open token ranges of the pack, as for `position_units`.

    Returns:
        slots: int64 [v], local indices (into the concatenated ranges) of visual tokens.
        rows: int64 [v], feature row of each.
    """
    tokens_per_tile = layout.tokens_per_tile
    starts = np.concatenate(
        [doc.image_starts + base for doc, base in zip(layout.documents, layout.cu_seqlens[:-1], strict=True)]
        + [np.zeros(0, np.int64)]
    )
    lengths = (
        np.concatenate([doc.num_tiles for doc in layout.documents] + [np.zeros(0, np.int64)])
        * tokens_per_tile
    )
    first_rows = np.cumsum(lengths) - lengths
    ends = starts + lengths
    slots: list[Int64Array] = []
    rows: list[Int64Array] = []
    local = 0
    for start, stop in ranges.tolist():
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, stop, side="left"))
        for image in range(first, last):
            low, high = max(int(starts[image]), start), min(int(ends[image]), stop)
            slots.append(np.arange(low - start + local, high - start + local, dtype=np.int64))
            rows.append(np.arange(low, high, dtype=np.int64) + (first_rows[image] - starts[image]))
        local += stop - start
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([*slots, empty]), np.concatenate([*rows, empty])


def release_padded_positions(
    units: Int64Array, *, keep: NDArray[np.bool_], tokens_per_tile: int
) -> Int64Array:
    """Positions as the release gives them when tokens are masked, for comparison with it only.

    A masked token (right padding, or a token of the text that happens to equal the padding id) gets
    position 1 and does not advance the counter. Here padding continues by whole steps instead: it sits at a
    document's end, under the causal mask nothing sees it, and its loss weight is 0.

    Args:
        units: int64 [t], units of the sample as if nothing were masked.
        keep: bool [t], False where masked.
        tokens_per_tile: the T of a unit 1/T.

    Returns:
        int64 [t], units.
    """
    steps = np.diff(units, prepend=-tokens_per_tile)
    walked = np.cumsum(np.where(keep, steps, 0)) - tokens_per_tile
    return np.where(keep, walked, tokens_per_tile)


def to_float(units: Int64Array, tokens_per_tile: int) -> np.ndarray:
    """Units as float64 positions, for display and comparison only."""
    return units / np.float64(tokens_per_tile)
