"""From a question with images to a prompt, by the template, tokenizer and tiling that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.cut import CutRule
from megatron_v2pe.data.media.image import ImageFile, check_image
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, MediumTiles, load_tile_range
from megatron_v2pe.data.media.tiling import rule_for_sample
from megatron_v2pe.data.samples.encode import encode_conversation
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is asked.

    Attributes:
        tokens: int64 [t], prompt tokens, visual tokens in place.
        layout: where the images are, and the stride of each.
        tiles: uint8 [n, 3, S, S] pixels (rows of several sizes for a pyramid, see `split_rows`), or float32 when they
            are normalised already.
    """

    tokens: Int64Array
    layout: SampleLayout
    tiles: np.ndarray


def build_prompt(
    turns: Sequence[Turn], images: Sequence[str], *, settings: SampleSettings, stride: int
) -> Prompt:
    """Encode a conversation that ends with a question, and read its images.

    Args:
        turns: messages, human and gpt in turn, the last one human. Where no turn has a placeholder, one
            `<image>` line for each image goes before the first, as the release's `chat` does for one image.
        images: image files, in the order of their placeholders.
        settings: template, tokenizer and tiling of the checkpoint.
        stride: position units that a visual token advances.

    Raises:
        ConfigError: placeholders and images differ in number.
        DataError: an image cannot be read.
    """
    turns = _with_placeholders(turns, len(images))
    rule = CutRule(tiling=rule_for_sample(settings.tiling, len(images)))
    media = []
    for path in images:
        file = ImageFile(path=path)
        sizes = file.probe(settings.media, sample_id="", size_of=check_image)
        media.append(MediumTiles(medium=file, images=file.tiles(sizes, rule), rules=settings.media))
    return prompt_with(turns, media, settings=settings, stride=stride)


def prompt_with(
    turns: Sequence[Turn], media: Sequence[MediumTiles], *, settings: SampleSettings, stride: int
) -> Prompt:
    """Encode a conversation that ends with a question, whose images are already cut; read them.

    Args:
        turns: messages, human and gpt in turn, the last one human, with a placeholder for each image.
        media: images and videos, in the order of their placeholders.
        settings: template and tokenizer of the checkpoint.
        stride: position units that a visual token advances.

    Raises:
        ConfigError: the prompt is too long.
        DataError: an image cannot be read.
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
    total = int(num_tiles.sum())
    tiles = load_tile_range(
        media,
        image_size=settings.tiling.image_size,
        smaller_sizes=settings.smaller_sizes,
        tile_range=(0, total),
    )
    return Prompt(tokens=encoded.tokens, layout=layout, tiles=tiles)


def _with_placeholders(turns: Sequence[Turn], num_images: int) -> list[Turn]:
    placeholders = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders == 0 and num_images:
        first = turns[0]
        value = f"{IMAGE_PLACEHOLDER}\n" * num_images + first.value
        return [Turn(role=first.role, value=value), *turns[1:]]
    if placeholders != num_images:
        raise ConfigError(
            f"the prompt has {placeholders} {IMAGE_PLACEHOLDER} for {num_images} images; give one for each image, or "
            "none to have them put before the question"
        )
    return list(turns)
