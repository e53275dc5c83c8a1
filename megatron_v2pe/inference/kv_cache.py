"""Keys and values of the tokens seen so far, layer by layer, in buffers allocated once.

On context parallel ranks each rank holds those of its own shard of the prompt, without the padding at its end, and
its turn of the new tokens: rank i holds new tokens i, i + cp, i + 2*cp, ... Their order does not matter any more,
because keys are stored after rotation and a new token sees all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Cache of one document.

    Args:
        capacity: most tokens that will be held here; extending past it is an error, not a reallocation.
        prompt_rows: tokens of this rank's share of the prompt that are not padding; None on one rank.
        group: context parallel ranks that share the document; None on one rank.

    Keys are stored after rotation and un-repeated (grouped-query heads), as attention reads them.
    """

    def __init__(self, capacity: int, *, prompt_rows: int | None = None, group: Any = None) -> None:
        self.capacity, self.prompt_rows, self.group = capacity, prompt_rows, group
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def is_empty(self, layer_number: int) -> bool:
        """Whether the layer has seen nothing yet: what comes now is the prompt."""
        return layer_number not in self._keys

    def add_prompt_share(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keep this rank's shard of the prompt, key and value [l, h, d], without its padding."""
        rows = len(key) if self.prompt_rows is None else self.prompt_rows
        self.extend(layer_number, key[:rows], value[:rows])

    def add_turn(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new token's key and value [1, h, d] if it is this rank's turn; return all that is held here."""
        step = self._steps.get(layer_number, 0)
        self._steps[layer_number] = step + 1
        mine = step % self.group.size() == self.group.rank()
        return self.extend(layer_number, key[: int(mine)], value[: int(mine)])

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [t, h, d] of new tokens; return those of all tokens [total, h, d]."""
        if layer_number not in self._keys:
            shape = (self.capacity, *key.shape[1:])
            self._keys[layer_number] = key.new_empty(shape)
            self._values[layer_number] = value.new_empty(shape)
        start = self._lengths.get(layer_number, 0)
        stop = start + len(key)
        if stop > self.capacity:
            raise IndexError(f"{stop} tokens do not fit a cache made for {self.capacity}")
        with torch.no_grad():
            self._keys[layer_number][start:stop] = key
            self._values[layer_number][start:stop] = value
        self._lengths[layer_number] = stop
        return self._keys[layer_number][:stop], self._values[layer_number][:stop]
