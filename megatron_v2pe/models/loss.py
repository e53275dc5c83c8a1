"""Cross entropy of supervised tokens, weighted per token, normalised once by the global weight.

    loss = sum over all ranks and micro batches of weight * cross_entropy / sum of weight

This is the release's formula with `loss_reduction_all_gather`; the division happens once, in the optimizer
step, after the sums have met over context and data parallel ranks. Rows without a label never meet the
output projection, and logits exist for `chunk` rows at a time, in forward and again in backward.

Shape legend: r supervised rows, H hidden, V vocabulary rows of this rank (the whole vocabulary when serial).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class HeadPorts:
    """What the head needs from other ranks when the vocabulary is split over tp; the defaults are serial.

    Attributes:
        first_word: id of the first vocabulary row of this rank.
        gather_hidden: differentiable; local hidden states to those of all tokens whose vocabulary rows
            this rank multiplies, its backward summing the partial gradients of the tp ranks.
        reduce_max: maximum over tp.
        reduce_sum: sum over tp.
    """

    first_word: int = 0
    gather_hidden: Callable[[Tensor], Tensor] = _identity
    reduce_max: Callable[[Tensor], Tensor] = _identity
    reduce_sum: Callable[[Tensor], Tensor] = _identity


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class ChunkedCrossEntropy(torch.autograd.Function):
    """Linear and softmax cross entropy without [r, V] logits; see `cross_entropy`.

    Backward recomputes a chunk's logits: d_logits = (softmax - one_hot) * grad, then the two products.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, words: Tensor, labels: Tensor, chunk: int, ports: HeadPorts
    ) -> Tensor:
        """Losses [r] of hidden [r, H] against words [V, H], a chunk of rows at a time."""
        losses, log_normalizers = [], []
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            logits = (rows @ words.t()).to(_working_dtype(hidden))  # [c, V]
            shift = ports.reduce_max(_row_max(logits))
            target_logit, _ = _pick(logits, targets, ports.first_word)
            exp_sum = (logits - shift[:, None]).exp_().sum(-1)
            target_logit, exp_sum = ports.reduce_sum(torch.stack([target_logit, exp_sum])).unbind()
            log_normalizers.append(exp_sum.log() + shift)
            losses.append(log_normalizers[-1] - target_logit)
        empty = hidden.new_zeros(0, dtype=_working_dtype(hidden))
        ctx.save_for_backward(hidden, words, labels, torch.cat([*log_normalizers, empty]))
        ctx.chunk, ctx.ports = chunk, ports
        return torch.cat([*losses, empty])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and words; logits are computed again, chunk by chunk."""
        hidden, words, labels, log_normalizers = ctx.saved_tensors
        chunk, ports = ctx.chunk, ctx.ports
        grad_hidden = torch.zeros_like(hidden)
        # float32 sums over chunks: a bf16 running sum would lose the small rows.
        grad_words = torch.zeros_like(words, dtype=_working_dtype(hidden))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            probabilities = (hidden[part] @ words.t()).to(_working_dtype(hidden))
            probabilities = (probabilities - log_normalizers[part, None]).exp_()
            _, (index, owned) = _pick(probabilities, labels[part], ports.first_word)
            if len(words):
                probabilities.scatter_add_(1, index[:, None], -owned.to(probabilities.dtype)[:, None])
            grad_logits = (probabilities * grads[0][part, None]).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ words
            grad_words += (grad_logits.t() @ hidden[part]).to(grad_words.dtype)
        return grad_hidden, grad_words.to(words.dtype), None, None, None


def _row_max(logits: Tensor) -> Tensor:
    """Maximum of each row; -inf for a rank without words."""
    if logits.shape[1] == 0:
        return logits.new_full((len(logits),), -torch.inf)
    return logits.amax(-1)


def _pick(values: Tensor, targets: Tensor, first_word: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value of each row's target where this rank owns it, else 0; with (local index, owned)."""
    index = targets - first_word
    owned = (index >= 0) & (index < values.shape[1])
    index = index.clamp(0, max(values.shape[1] - 1, 0))
    if values.shape[1] == 0:  # a rank whose vocabulary rows are all padding
        return values.new_zeros(len(values)), (index, owned)
    picked = values.gather(1, index[:, None]).squeeze(1)
    return torch.where(owned, picked, torch.zeros_like(picked)), (index, owned)


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, chunk: int, ports: HeadPorts
) -> Tensor:
    """Cross entropy of each supervised row.

    Args:
        hidden: [r, H], final hidden states after `ports.gather_hidden`.
        weight: [V_padded, H], output projection of this rank.
        labels: int64 [r], global word ids.
        vocab_size: words of the whole vocabulary; rows beyond it are padding and get no probability.
        chunk: rows whose logits exist at a time.
        ports: collectives over tp.

    Returns:
        float32 [r] (float64 for float64 input).
    """
    num_words = min(max(vocab_size - ports.first_word, 0), len(weight))
    return ChunkedCrossEntropy.apply(hidden, weight[:num_words], labels, chunk, ports)


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Numerator of the loss: sum of weight * loss, in the losses' dtype."""
    return (losses * weights.to(losses.dtype)).sum()
