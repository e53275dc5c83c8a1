"""Loss of each data set of the mixture, exact under every layout, without a collective or a read of its own.

    losses, weights [1, l] --data set of each token--> sums by data set [S], on the device      each micro batch
    loss weights, lengths of the packs, on the host --> weights, tokens by data set [S]         each step
    both are reduced together with the loss, in the one sum over the world of each step --> SourceTotals

The mean of a data set is sum of weight * loss over sum of weight, as the loss itself (`models.loss`), so the means
times their shares of the weight add up to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.v2pe.layout import Int64Array


@dataclass(frozen=True, kw_only=True)
class SourceTotals:
    """Sums over the global batch by data set, in the order of the meta json; equal on every rank.

    Attributes:
        loss_sums: sum of weight * loss; not finite where a loss of that data set is not.
        weights: sum of loss weights.
        tokens: tokens of documents, without padding.
    """

    loss_sums: tuple[float, ...]
    weights: tuple[float, ...]
    tokens: tuple[int, ...]

    def losses(self, names: Sequence[str]) -> dict[str, float | None]:
        """Mean loss of each data set that has a supervised token in the step; None where it is not finite."""
        return {
            name: loss_sum / weight if math.isfinite(loss_sum) and math.isfinite(weight) else None
            for name, loss_sum, weight in zip(names, self.loss_sums, self.weights, strict=True)
            if weight
        }

    def weight_shares(self, names: Sequence[str]) -> dict[str, float | None]:
        """Share of the step's loss weight; the shares of a step add up to 1."""
        total = math.fsum(self.weights)
        return {
            name: weight / total if math.isfinite(total) else None
            for name, weight in zip(names, self.weights, strict=True)
            if weight
        }

    def token_counts(self, names: Sequence[str]) -> dict[str, int]:
        """Tokens of each data set of which a document is in the step."""
        return {name: count for name, count in zip(names, self.tokens, strict=True) if count}


def source_of_tokens(pack: PackedBatch, local_lengths: Sequence[int]) -> Int64Array:
    """Data set of each token that a rank holds, int64 [l].

    Args:
        pack: the whole pack.
        local_lengths: padded tokens of each document on this rank (`LocalBatch.local_lengths`).

    Example:
        sources (3, 1), local_lengths (4, 2): [3, 3, 3, 3, 1, 1].
    """
    return np.repeat(np.array(pack.sources, dtype=np.int64), local_lengths)


def local_loss_sums(
    pack: PackedBatch,
    losses: Tensor,
    weights: Tensor,
    *,
    local_lengths: Sequence[int],
    num_sources: int,
) -> Tensor:
    """Sum of weight * loss of this rank's tokens by data set.

    Args:
        pack: the whole pack.
        losses: float [1, l], 0 where there is no label.
        weights: float32 [1, l].
        local_lengths: padded tokens of each document on this rank.
        num_sources: data sets S.

    Returns:
        float64 [S], on the losses' device.
    """
    (index,) = to_device([source_of_tokens(pack, local_lengths)], losses.device)
    sums = torch.zeros(num_sources, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, index, (losses * weights).squeeze(0).double())


def weights_and_tokens(batches: Sequence[PackedBatch], *, num_sources: int) -> NDArray[np.float64]:
    """Loss weight and tokens of whole packs by data set, float64 [2, S]."""
    totals = np.zeros((2, num_sources))
    for batch in batches:
        weights = np.add.reduceat(batch.loss_weights, batch.layout.cu_seqlens[:-1], dtype=np.float64)
        lengths = np.array([document.num_tokens for document in batch.layout.documents], dtype=np.float64)
        for row, values in zip(totals, (weights, lengths), strict=True):
            np.add.at(row, list(batch.sources), values)
    return totals
