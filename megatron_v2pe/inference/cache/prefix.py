"""What two prompts have in common at their start: tokens, positions and pixels.

A prefix may be shared when a forward pass over it would give the same keys and values: the same tokens, the same
images (by content and cut) at the same places with the same strides, and the same rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.inference.cache.kv_cache import KVCache
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What a document's keys and values depend on, beside the model.

    Attributes:
        tokens: int64 [t].
        layout: images and strides; of at least t tokens.
        digests: one for each image, see `tiles.TileSource.digests`.
        frequencies: identity of the rotary frequencies.
    """

    tokens: Int64Array
    layout: SampleLayout
    digests: Sequence[str]
    frequencies: tuple[float, ...]


def common_prefix(one: Content, other: Content) -> int:
    """Tokens at the start whose keys and values are the same in both.

    Example: texts that differ at token 7 have 7 in common; where the second image differs, what is before it.
    """
    if one.frequencies != other.frequencies or one.layout.tokens_per_tile != other.layout.tokens_per_tile:
        return 0
    length = min(len(one.tokens), len(other.tokens))
    different = np.flatnonzero(one.tokens[:length] != other.tokens[:length])
    length = int(different[0]) if len(different) else length
    for index in range(max(one.layout.num_images, other.layout.num_images)):
        starts = [
            int(content.layout.image_starts[index])
            for content in (one, other)
            if index < content.layout.num_images
        ]
        if min(starts) >= length:
            break
        if len(starts) < 2 or not _same_image(one, other, index):
            return min(length, *starts)
    return length


def _same_image(one: Content, other: Content, index: int) -> bool:
    pairs = ((content.layout, content.digests) for content in (one, other))
    facts = [
        (int(la.image_starts[index]), int(la.num_tiles[index]), int(la.strides[index]), digests[index])
        for la, digests in pairs
    ]
    return facts[0] == facts[1]


@dataclass(frozen=True, eq=False)
class _Kept:
    content: Content
    cache: KVCache


class PrefixStore:
    """Caches of documents that were answered about, the newest last.

    Args:
        max_tokens: tokens that are kept in all; 0 keeps nothing. The oldest documents go first.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._kept: list[_Kept] = []

    @property
    def num_documents(self) -> int:
        """Documents that are kept."""
        return len(self._kept)

    def longest(self, content: Content) -> tuple[int, KVCache | None]:
        """Tokens that a kept document has in common with this one, and its cache."""
        best: tuple[int, KVCache | None] = (0, None)
        for index in range(len(self._kept) - 1, -1, -1):
            kept = self._kept[index]
            length = min(common_prefix(kept.content, content), kept.cache.num_tokens)
            if length > best[0]:
                best = length, kept.cache
        return best

    def make_room(self, tokens: int, keep: KVCache | None) -> None:
        """Forget the oldest documents until that many more tokens fit, but not the one whose prefix is to be used."""
        while self._kept and sum(kept.cache.num_tokens for kept in self._kept) + tokens > self.max_tokens:
            victims = [kept for kept in self._kept if kept.cache is not keep]
            if not victims:
                return
            self._kept.remove(victims[0])

    def add(self, content: Content, cache: KVCache) -> None:
        """Keep a document; one that is a prefix of it is forgotten, as nothing is lost with it."""
        if self.max_tokens == 0 or cache.num_tokens == 0:
            return
        self._kept = [
            kept for kept in self._kept if common_prefix(kept.content, content) < kept.cache.num_tokens
        ]
        self.make_room(cache.num_tokens, None)
        if cache.num_tokens <= self.max_tokens:
            self._kept.append(_Kept(content, cache))

    @property
    def newest(self) -> tuple[Content, KVCache] | None:
        """The document that was answered about last."""
        return (self._kept[-1].content, self._kept[-1].cache) if self._kept else None

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
