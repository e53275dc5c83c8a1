"""What both models are given: two documents with images and one without, random token ids, random pixels.

    document 0   7 tokens [2 tiles] 9 tokens     document 1   5 tokens [1 tile] 6 tokens     document 2   11 tokens

With 256 visual tokens per tile that is 806 tokens; positions restart in each document.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.batch.packed_batch import PackedBatch, tile_shape
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import PositionConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.samples.encode import EncodedSample
from megatron_v2pe.v2pe.layout import SampleLayout

_DOCUMENTS = ((7, 2, 9), (5, 1, 6), (11, 0, 0))
"""Text tokens, tiles of one image, text tokens."""
_SEED = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One pack, as facts that either model can start from.

    Attributes:
        tokens: int64 [t]; visual tokens have id 0, which neither model reads.
        is_visual: bool [t].
        lengths: tokens of each document.
        num_tiles: tiles of each image, in order.
        pixels: float32 [n, *tile_shape(tile_sizes)], normalised already.
        tile_sizes: pixels of a tile's side in every branch of the tower.
        stride: units of 1/tokens_per_tile that a visual token advances.
        tokens_per_tile: visual tokens of one tile.
        is_v2pe: the stride was asked for, so positions may be fractions.
    """

    tokens: np.ndarray
    is_visual: np.ndarray
    lengths: tuple[int, ...]
    num_tiles: tuple[int, ...]
    pixels: Tensor
    tile_sizes: tuple[int, ...]
    stride: int
    tokens_per_tile: int
    is_v2pe: bool

    @property
    def document_starts(self) -> list[int]:
        """Where each document starts, and the end of the last."""
        return [0, *accumulate(self.lengths)]

    @property
    def position_config(self) -> PositionConfig:
        """Positions of a run with these inputs."""
        return PositionConfig(mode="v2pe_fixed", stride=self.stride) if self.is_v2pe else PositionConfig()

    def pack(self, *, pad_to_multiple: int) -> PackedBatch:
        """The pack as training would see it; it holds no pixels."""
        samples, images = [], iter(self.num_tiles)
        starts = self.document_starts
        for number, (start, length) in enumerate(zip(starts, self.lengths, strict=False)):
            tokens, visual = self.tokens[start : start + length], self.is_visual[start : start + length]
            tiles = [next(images)] if visual.any() else []
            layout = SampleLayout(
                num_tokens=length,
                image_starts=np.flatnonzero(visual)[:1],
                num_tiles=np.array(tiles, dtype=np.int64),
                strides=np.full(len(tiles), self.stride, dtype=np.int64),
                tokens_per_tile=self.tokens_per_tile,
            )
            samples.append(
                EncodedSample(
                    tokens=tokens, labels=tokens, layout=layout, media=(), sample_id=f"document {number}"
                )
            )
        return collate_pack(
            samples,
            pad_to_multiple=pad_to_multiple,
            pad_token_id=0,
            loss_reduction="token",
            image_size=self.tile_sizes[0],
            smaller_sizes=self.tile_sizes[1:],
            tile_range_of=lambda _num_tiles: (0, 0),
        )


def make_inputs(arch: InternVLArchitecture, *, stride: int) -> Inputs:
    """The pack for an architecture, the same on every rank.

    Args:
        arch: says tile size, tokens per tile and vocabulary.
        stride: units of 1/tokens_per_tile that a visual token advances; 0 means ordinary positions.

    Raises:
        ConfigError: the stride is out of range.
    """
    per_tile = arch.tokens_per_tile
    if not 0 <= stride <= per_tile:
        raise ConfigError(
            f"--stride is {stride}, but must lie in 1..{per_tile} (visual tokens per tile of this checkpoint), or be 0 "
            "for ordinary positions"
        )
    generator = np.random.default_rng(_SEED)
    visual = [
        np.repeat([False, True, False], [before, tiles * per_tile, after])
        for before, tiles, after in _DOCUMENTS
    ]
    is_visual = np.concatenate(visual)
    text_ids = generator.integers(1, arch.language.vocab_size, size=len(is_visual))
    num_tiles = tuple(tiles for _, tiles, _ in _DOCUMENTS if tiles)
    shape = (sum(num_tiles), *tile_shape(arch.tile_sizes))
    return Inputs(
        tokens=np.where(is_visual, 0, text_ids).astype(np.int64),
        is_visual=is_visual,
        lengths=tuple(len(flags) for flags in visual),
        num_tiles=num_tiles,
        pixels=torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)),
        tile_sizes=arch.tile_sizes,
        stride=stride or per_tile,
        tokens_per_tile=per_tile,
        is_v2pe=stride > 0,
    )
