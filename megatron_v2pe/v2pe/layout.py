"""Where a sample's visual tokens are: a run-length layout that answers every per-token question.

    tokens     t t t t <img> v v v v v v v v </img> t t <img> v v v v </img> t
    layout     num_tokens=20, image_starts=[5, 17], num_tiles=[2, 1], tokens_per_tile=4

Text runs are what lies between the image spans; `<img>` and `</img>` are ordinary text tokens. A pack
is a list of documents (samples), and a document is a `SampleLayout` shifted to where it starts.

Shape legend: I images of a sample, N documents of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleLayout:
    """Run-length description of one sample (one document).

    Attributes:
        num_tokens: length of the sample in tokens, without padding.
        image_starts: int64 [I], index of the first visual token of each image, ascending.
        num_tiles: int64 [I], tiles of each image, thumbnail included.
        strides: int64 [I], position units (1/tokens_per_tile) that one visual token advances; the paper's
            lie in 1..tokens_per_tile, larger ones spread an image wider than text.
        tokens_per_tile: visual tokens of one tile (256 at 448 px), the T of a position unit 1/T.

    Raises:
        ValueError: arrays of different lengths, overlapping spans, or a stride below 1.
    """

    num_tokens: int
    image_starts: Int64Array
    num_tiles: Int64Array
    strides: Int64Array
    tokens_per_tile: int

    def __post_init__(self) -> None:
        if not len(self.image_starts) == len(self.num_tiles) == len(self.strides):
            raise ValueError(
                f"image_starts, num_tiles and strides differ in length: {len(self.image_starts)}, "
                f"{len(self.num_tiles)}, {len(self.strides)}"
            )
        if len(self.strides) and int(self.strides.min()) < 1:
            raise ValueError(f"strides {self.strides.tolist()} must be at least 1 unit")
        ends = self.image_starts + self.num_tiles * self.tokens_per_tile
        starts_after = np.append(self.image_starts[1:], self.num_tokens)
        if len(ends) and (self.image_starts[0] < 0 or bool((ends > starts_after).any())):
            raise ValueError(f"image spans overlap or exceed the sample of {self.num_tokens} tokens")

    @property
    def num_images(self) -> int:
        """Number of images I."""
        return len(self.image_starts)

    @property
    def total_tiles(self) -> int:
        """Tiles of all images."""
        return int(self.num_tiles.sum())

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that are replaced by image features."""
        return self.total_tiles * self.tokens_per_tile

    @property
    def next_position(self) -> int:
        """Whole position that a token after the sample would have.

        An image of n tiles at stride s advances by n*s whole positions (n*T tokens of s/T each), so
        the sample ends on a whole position whatever its strides are.
        """
        visual = int((self.num_tiles * self.strides).sum())
        return self.num_tokens - self.num_visual_tokens + visual

    def with_strides(self, strides: Sequence[int] | Int64Array) -> SampleLayout:
        """The same layout with other strides, one for each image."""
        return SampleLayout(
            num_tokens=self.num_tokens,
            image_starts=self.image_starts,
            num_tiles=self.num_tiles,
            strides=np.asarray(strides, dtype=np.int64),
            tokens_per_tile=self.tokens_per_tile,
        )


def text_layout(num_tokens: int, *, tokens_per_tile: int) -> SampleLayout:
    """Layout of a sample without images."""
    empty = np.zeros(0, dtype=np.int64)
    return SampleLayout(
        num_tokens=num_tokens,
        image_starts=empty,
        num_tiles=empty,
        strides=empty,
        tokens_per_tile=tokens_per_tile,
    )


def blank_layout(num_tokens: int, *, num_tiles: int, tokens_per_tile: int) -> SampleLayout:
    """Layout of a sample of which nothing but its lengths is known: all its tiles are at the start, as one image."""
    if not num_tiles:
        return text_layout(num_tokens, tokens_per_tile=tokens_per_tile)
    return SampleLayout(
        num_tokens=num_tokens,
        image_starts=np.zeros(1, dtype=np.int64),
        num_tiles=np.array([num_tiles], dtype=np.int64),
        strides=np.array([tokens_per_tile], dtype=np.int64),
        tokens_per_tile=tokens_per_tile,
    )


def find_images(
    tokens: Int64Array, *, image_token_id: int, num_tiles: Sequence[int], tokens_per_tile: int
) -> Int64Array:
    """Index of the first visual token of each image in a tokenised sample.

    Args:
        tokens: int64 [t], token ids; visual tokens carry `image_token_id`.
        image_token_id: id of `<IMG_CONTEXT>`.
        num_tiles: tiles of each image, in order of appearance.
        tokens_per_tile: visual tokens of one tile.

    Returns:
        int64 [I], ascending.

    Raises:
        ValueError: the number of visual tokens is not that of the tiles, or an image is interrupted.
    """
    slots = np.flatnonzero(tokens == image_token_id)
    lengths = np.asarray(num_tiles, dtype=np.int64) * tokens_per_tile
    if len(slots) != int(lengths.sum()):
        raise ValueError(f"{len(slots)} visual tokens for {int(lengths.sum())} expected by the tiles")
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if len(lengths) else lengths
    starts = slots[firsts] if len(lengths) else slots
    if len(lengths) and bool((slots[firsts + lengths - 1] - starts + 1 != lengths).any()):
        raise ValueError("the visual tokens of an image are not one uninterrupted run")
    return starts.astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackLayout:
    """Documents of a pack, one after the other, each padded at its end.

    Attributes:
        documents: layouts of the N documents; positions restart at 0 in each.
        cu_seqlens: int64 [N+1], token index where each document starts, padding included. Padding
            belongs to the document before it and its positions continue by whole steps.
        tokens_per_tile: visual tokens of one tile.
    """

    documents: tuple[SampleLayout, ...]
    cu_seqlens: Int64Array
    tokens_per_tile: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, padding included."""
        return int(self.cu_seqlens[-1])

    @property
    def num_tiles(self) -> int:
        """Tiles of all documents."""
        return sum(document.total_tiles for document in self.documents)

    @property
    def rope_length(self) -> int:
        """Largest whole position of the pack plus one; dynamic NTK scales by it."""
        return max(document.next_position for document in self.documents)

    def is_token(self, index: Int64Array) -> NDArray[np.bool_]:
        """Whether tokens of the pack are a document's own, not padding; bool, of the shape of `index`."""
        document = np.searchsorted(self.cu_seqlens, index, side="right") - 1
        lengths = np.array([each.num_tokens for each in self.documents], dtype=np.int64)
        return index - self.cu_seqlens[document] < lengths[document]


def padded_lengths(lengths: Sequence[int], *, pad_to_multiple: int, pack_multiple: int = 1) -> list[int]:
    """Tokens of each document of a pack with its padding; see `pack_layout`."""
    padded = [-(-length // pad_to_multiple) * pad_to_multiple for length in lengths]
    padded[-1] += -sum(padded) % pack_multiple
    return padded


def pack_layout(
    documents: Sequence[SampleLayout], *, pad_to_multiple: int = 1, pack_multiple: int = 1
) -> PackLayout:
    """Lay documents out one after the other, each padded to `pad_to_multiple` tokens, all to `pack_multiple`.

    What is missing to `pack_multiple`, a multiple of `pad_to_multiple` or 1, is padding of the last document.

    Example: documents of 5 and 8 tokens, padded to multiples of 4, give cu_seqlens [0, 8, 16]; with packs of whole
    multiples of 32, [0, 8, 32].
    """
    lengths = padded_lengths(
        [document.num_tokens for document in documents],
        pad_to_multiple=pad_to_multiple,
        pack_multiple=pack_multiple,
    )
    return PackLayout(
        documents=tuple(documents),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens_per_tile=documents[0].tokens_per_tile,
    )
