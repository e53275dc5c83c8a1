"""How tensors change shape between Hugging Face and ours; each transform is defined with its exact inverse.

    to_ours   one or more Hugging Face tensors  ->  one tensor of ours
    to_hf     that tensor                       ->  the same Hugging Face tensors, bit for bit

Only rows (dimension 0) move, no value is computed, so any dtype survives. Weights are [rows, columns] and biases
[rows]; the same code handles both.

Shape legend: g kv groups (= kv heads), m query heads of a group, d channels of a head, f hidden size of the MLP,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A pair of functions that undo each other.

    Attributes:
        is_stacked: the Hugging Face tensors follow one another along dimension 0 of our tensor, with equal numbers of
            rows; an importer may then write each on its own instead of building the whole tensor.
    """

    is_stacked: bool

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensor from the Hugging Face tensors of one rule."""

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The Hugging Face tensors from ours."""


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    is_stacked = True

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Transform`."""
        (tensor,) = parts
        return tensor

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """See `Transform`."""
        return [tensor]


@dataclass(frozen=True)
class StackRows:
    """Several tensors of one shape, one below the other: gate and up become `linear_fc1`.

    Args:
        num_parts: how many Hugging Face tensors there are.
    """

    num_parts: int = 2
    is_stacked = True

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """[f, ...] each -> [num_parts * f, ...]."""
        return torch.cat(list(parts))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[num_parts * f, ...] -> [f, ...] each, views."""
        return list(tensor.chunk(self.num_parts))


@dataclass(frozen=True)
class GroupHeads:
    """Rows q, k, v, all heads of one kind together, to mcore's rows per kv group: m queries, key, value.

    With 2 kv groups of 2 queries: q0 q1 q2 q3 k0 k1 v0 v1  <->  q0 q1 k0 v0 q2 q3 k1 v1.

    Args:
        num_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: key (and value) heads.
        head_dim: rows of one head.
        is_fused: q, k and v are one Hugging Face tensor [q | k | v], else three.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_fused: bool = True
    is_stacked = False

    @property
    def _kv_rows(self) -> int:
        return self.num_kv_heads * self.head_dim

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """[g m d, ...], [g d, ...], [g d, ...] by kind -> [g (m + 1 + 1) d, ...] by group."""
        kinds: Sequence[Tensor] = parts
        if self.is_fused:
            (fused,) = parts
            kinds = fused.split([self.num_heads * self.head_dim, self._kv_rows, self._kv_rows])
        columns = kinds[0].shape[1:]
        # [g x d, .] -> [g, x d, .] -> [g (m+2) d, .]
        grouped = [kind.reshape(self.num_kv_heads, -1, *columns) for kind in kinds]
        return torch.cat(grouped, dim=1).reshape(-1, *columns)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[g (m + 1 + 1) d, ...] by group -> [g m d, ...], [g d, ...], [g d, ...] by kind."""
        columns = tensor.shape[1:]
        query_rows = self.num_heads // self.num_kv_heads * self.head_dim
        grouped = tensor.reshape(self.num_kv_heads, -1, *columns)  # [g (m+2) d, .] -> [g, (m+2) d, .]
        kinds = grouped.split([query_rows, self.head_dim, self.head_dim], dim=1)
        parts = [kind.reshape(-1, *columns) for kind in kinds]
        return [torch.cat(parts)] if self.is_fused else parts


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of the vocabulary, with zero rows below them where tensor parallelism needs a rounder number.

    Args:
        vocab_size: rows of the Hugging Face tensor.
        padded_size: rows of ours. An imported checkpoint stores `vocab_size` rows, so that it suits every
            tensor parallel size; a trained one stores the rows of its run.
    """

    vocab_size: int
    padded_size: int
    is_stacked = True

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """[V, ...] -> [padded V, ...]."""
        (tensor,) = parts
        missing_rows = self.padded_size - self.vocab_size
        if missing_rows == 0:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(missing_rows, *tensor.shape[1:])])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[at least V, ...] -> [V, ...], a view."""
        return [tensor[: self.vocab_size]]
