"""Keys and values of the tokens seen so far, layer by layer, in buffers allocated once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Cache of one document.

    Args:
        capacity: most tokens that will be held; extending past it is an error, not a reallocation.

    Keys are stored after rotation and un-repeated (grouped-query heads), as attention reads them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

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
