"""What attention asks of a cache of keys and values; `inference` has the one in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251  # the name of the type, nothing is sent


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens of one document, layer by layer, as the attention core uses them.

    `key` and `value` are [t, k, d] of t new tokens with k key heads, keys after rotation.

    Attributes:
        group: context parallel ranks that share the document; None on one rank.
    """

    group: ProcessGroup | None

    def is_empty(self, layer_number: int) -> bool:
        """Whether the layer has no keys yet: what comes now is the prompt."""

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens; return keys and values of all tokens [T, k, d]."""

    def add_prompt_share(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keep this rank's shard of the prompt."""

    def add_turn(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep one new token on the rank whose turn it is; return what this rank holds [T_local, k, d]."""
