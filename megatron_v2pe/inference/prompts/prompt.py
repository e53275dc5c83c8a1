"""What is asked: tokens, where the images are in them, and where their pixels come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.medium import MediumTiles
from megatron_v2pe.data.samples.encode import encode_conversation
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.inference.prompts.tiles import FileTiles, TileSource
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is asked.

    Attributes:
        tokens: int64 [t], prompt tokens, visual tokens in place.
        layout: where the images are, and the stride of each.
        tiles: their pixels, opened when they are needed.
    """

    tokens: Int64Array
    layout: SampleLayout
    tiles: TileSource

    def with_tokens(self, more: Sequence[int]) -> Prompt:
        """The prompt with text tokens after it, an answer to be scored for example."""
        tokens = np.concatenate([self.tokens, np.asarray(more, dtype=np.int64)])
        return replace(self, tokens=tokens, layout=replace(self.layout, num_tokens=len(tokens)))


def prompt_with(
    turns: Sequence[Turn], media: Sequence[MediumTiles], *, settings: SampleSettings, stride: int
) -> Prompt:
    """Encode a conversation that ends with a question, whose images are measured already.

    Args:
        turns: messages, human and gpt in turn, the last one human, with a placeholder for each image.
        media: images and videos, in the order of their placeholders.
        settings: template and tokenizer of the checkpoint.
        stride: position units that a visual token advances.

    Raises:
        ConfigError: the prompt is too long.
    """
    grids = [image.grid for each in media for image in each.images]
    num_tiles = np.array([grid.num_tiles for grid in grids], dtype=np.int64)
    encoded = encode_conversation(
        turns, num_tiles=num_tiles.tolist(), settings=settings.text, add_generation_prompt=True
    )
    if encoded.num_uncut_tokens > settings.text.max_tokens:
        raise ConfigError(
            f"the prompt has {encoded.num_uncut_tokens} tokens, more than the limit of {settings.text.max_tokens}; "
            "shorten it or raise the limit"
        )
    layout = SampleLayout(
        num_tokens=len(encoded.tokens),
        image_starts=encoded.image_starts,
        num_tiles=num_tiles,
        strides=np.full(len(grids), stride, dtype=np.int64),
        tokens_per_tile=settings.text.tokens_per_tile,
    )
    tiles = FileTiles(media, settings.tiling.image_size, settings.smaller_sizes)
    return Prompt(tokens=encoded.tokens, layout=layout, tiles=tiles)
