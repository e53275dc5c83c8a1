"""What attention asks of a cache of keys and values; `inference.kv_cache` has the one in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251  # the name of the type, nothing is sent


class KeyValueStore(Protocol):
    """Keys and values of one document on this rank, layer by layer."""

    def parts(self, layer_number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values held here, part by part: [k, n, d] each, rotated, in the compute dtype."""

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keep [n, k, d] of new tokens."""


class CacheStep(Protocol):
    """What one forward pass does with caches.

    Attributes:
        stores: the documents of the batch; exactly one for a prefill chunk.
        is_chunk: a prefill chunk; else one new token of each document.
        kept: of a chunk, local tokens that are not padding; they come first.
        past_rows: of a chunk, keys that each context parallel rank holds before it.
        owners: of new tokens, the context parallel rank that keeps each.
        group: context parallel ranks; None on one rank.
    """

    @property
    def stores(self) -> Sequence[KeyValueStore]: ...  # noqa: D102
    @property
    def is_chunk(self) -> bool: ...  # noqa: D102
    @property
    def kept(self) -> int: ...  # noqa: D102
    @property
    def past_rows(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def owners(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def group(self) -> ProcessGroup | None: ...  # noqa: D102
