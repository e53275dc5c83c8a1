"""What attention asks of a cache of keys and values; `inference.kv_cache` has the one in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from megatron_v2pe.v2pe.layout import Int64Array

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251  # the name of the type, nothing is sent


class KeyValueStore(Protocol):
    """Keys and values of one document on this rank, layer by layer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the document that ranks hold together, those of the present pass included."""

    def parts(self, layer_number: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values held here from row `first` on, part by part: [k, n, d], rotated, in the compute dtype."""

    def rows_of(self, rank: int, tokens: int) -> int:
        """Rows that a rank holds of the first tokens; they are its first rows."""

    def tokens_held(self, rank: int, first: int, stop: int) -> Int64Array:
        """Which of the tokens first..stop-1 a rank holds, in the order of its rows, which is rising."""

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
        start: of a chunk, its first token.
        padded: of a chunk, its tokens on all ranks, padding included.
        group: context parallel ranks; None on one rank.
        halo_plans: of a chunk, what attention noted for each window; empty at first.
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
    def start(self) -> int: ...  # noqa: D102
    @property
    def padded(self) -> int: ...  # noqa: D102
    @property
    def halo_plans(self) -> dict[int, Any]: ...  # noqa: D102
    @property
    def group(self) -> ProcessGroup | None: ...  # noqa: D102
