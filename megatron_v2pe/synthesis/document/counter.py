"""Tokens of texts, images and whole conversations, by the functions that training uses.

A document is filled unit by unit, so units are counted one by one, each after the end of a sentence. Most tokenizers
never join characters over a blank, and then the sum is exact; where it is not, `conversation` shows it and the document
is corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.data.media.tiling import choose_grid
from megatron_v2pe.data.samples.encode import encode_conversation
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.synthesis.material.pictures import Picture

_BEFORE = "word."


class TokenCounter:
    """Counts for one checkpoint and one way of tiling.

    Args:
        settings: tokenizer, template and tiling; without a limit of length.
    """

    def __init__(self, settings: SampleSettings) -> None:
        self._settings = settings
        self._tokenizer = settings.text.tokenizer
        self._before = len(self._tokenizer.encode(_BEFORE, add_bos=False))

    def text(self, text: str) -> int:
        """Tokens that some running text adds, its leading blank or line break included."""
        return len(self._tokenizer.encode(_BEFORE + text, add_bos=False)) - self._before

    def tiles(self, picture: Picture) -> int:
        """Tiles of an image, thumbnail included."""
        return choose_grid(*picture.size, rule=self._settings.tiling).num_tiles

    def picture(self, picture: Picture) -> int:
        """Tokens of an image with the two tokens around it."""
        return self.tiles(picture) * self._settings.text.tokens_per_tile + 2

    def conversation(self, message: str, answer: str, pictures: Sequence[Picture]) -> int:
        """Tokens of the whole sample: template, message with its images, answer and its end."""
        encoded = encode_conversation(
            [Turn(role="human", value=message), Turn(role="gpt", value=answer)],
            num_tiles=[self.tiles(picture) for picture in pictures],
            settings=self._settings.text,
        )
        return encoded.num_uncut_tokens
