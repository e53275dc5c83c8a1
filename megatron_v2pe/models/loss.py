"""Cross entropy of supervised tokens, weighted per token, normalised once by the global weight.

    loss = sum over all ranks and micro batches of weight * cross_entropy / sum of weight

This is the release's formula with `loss_reduction_all_gather`; the division happens once, in the optimizer
step, after the sums over context and data parallel ranks. Rows without a label are never multiplied with the
output projection, and logits exist for one loss chunk of rows at a time, once.

All rows of the projection are multiplied, padding included: 92,553 columns would give matrices whose rows start at odd
addresses, which tensor cores read slowly. Columns of padding are -inf before the softmax, so they get no probability,
and their weights, which are zero, no gradient.

Shape legend: r supervised rows, c rows of a loss chunk, H hidden, V vocabulary rows of this rank, padding included.
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
        vocab_start_index: id of the first vocabulary row of this rank.
        gather_hidden: differentiable; local hidden states to those of all tokens whose vocabulary rows
            this rank multiplies, its backward summing the partial gradients of the tp ranks.
        own_rows: of a value for each local token, those of this rank's rows between layers.
        reduce_max: maximum over tp.
        reduce_sum: sum over tp.
    """

    vocab_start_index: int = 0
    gather_hidden: Callable[[Tensor], Tensor] = _identity
    own_rows: Callable[[Tensor], Tensor] = _identity
    reduce_max: Callable[[Tensor], Tensor] = _identity
    reduce_sum: Callable[[Tensor], Tensor] = _identity


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Linear and weighted softmax cross entropy without [r, V] logits; see `weighted_cross_entropy`.

    d total / d logits = (softmax - one_hot) * weight is known as soon as the logits of a loss chunk are, because
    the result is one number: so both products of the gradient are formed in the forward pass, while the logits exist,
    and backward only scales them. Computing the logits again in backward would cost a third more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        vocab_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        rows_of_rank: int,
        loss_chunk_tokens: int,
        ports: HeadPorts,
        is_differentiated: bool,
    ) -> tuple[Tensor, Tensor]:
        """Total [] and losses [r] of hidden [r, H] against vocab_weight [V, H], one loss chunk at a time."""
        working = _working_dtype(hidden)
        weights = weights.to(working)
        losses = torch.empty(len(hidden), dtype=working, device=hidden.device)
        wanted = [is_differentiated and needed for needed in ctx.needs_input_grad[:2]]
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_vocab_weight = None  # the first loss chunk's makes it
        for start in range(0, len(hidden), loss_chunk_tokens):
            rows = slice(start, start + loss_chunk_tokens)
            logits = (hidden[rows] @ vocab_weight.t()).to(working)  # [c, V]
            logits[:, rows_of_rank:] = -torch.inf
            losses[rows], normalizers = _losses(logits, labels[rows], ports)
            if not any(wanted):
                continue
            grad_logits = _grad_logits(
                logits, labels[rows], weights[rows], normalizers, ports.vocab_start_index
            ).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ vocab_weight
            if wanted[1]:
                part = grad_logits.t() @ hidden[rows]
                # float32 sums over loss chunks: a bf16 running sum would lose the small rows.
                grad_vocab_weight = (
                    part.to(working) if grad_vocab_weight is None else grad_vocab_weight.add_(part)
                )
        if wanted[1] and grad_vocab_weight is None:  # no row has a label
            grad_vocab_weight = torch.zeros_like(vocab_weight, dtype=working)
        ctx.save_for_backward(grad_hidden, grad_vocab_weight)
        ctx.dtype = vocab_weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and vocab_weight: those of the forward pass times the total's."""
        grad_hidden, grad_vocab_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0]
        if grad_vocab_weight is not None:
            # In place: it is as large as the head.
            grad_vocab_weight = grad_vocab_weight.mul_(grads[0]).to(ctx.dtype)
        return grad_hidden, grad_vocab_weight, None, None, None, None, None, None


def _losses(logits: Tensor, targets: Tensor, ports: HeadPorts) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and its sum of exponentials; the logits [c, V] become those exponentials."""
    shift = ports.reduce_max(logits.amax(-1))
    target_logit, _ = _pick(logits, targets, ports.vocab_start_index)
    exp_sum = logits.sub_(shift[:, None]).exp_().sum(-1)
    target_logit, exp_sum = ports.reduce_sum(torch.stack([target_logit, exp_sum])).unbind()
    return exp_sum.log() + shift - target_logit, exp_sum


def _grad_logits(
    exponentials: Tensor, targets: Tensor, weights: Tensor, normalizers: Tensor, vocab_start_index: int
) -> Tensor:
    """(softmax - one_hot) * weight, in the place of the exponentials [c, V]."""
    gradient = exponentials.mul_((weights / normalizers)[:, None])
    _, (index, owned) = _pick(gradient, targets, vocab_start_index)
    return gradient.scatter_add_(1, index[:, None], -(owned * weights)[:, None])


def _pick(values: Tensor, targets: Tensor, vocab_start_index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value of each row's target where this rank owns it, else 0; with (local index, owned)."""
    index = targets - vocab_start_index
    owned = (index >= 0) & (index < values.shape[1])
    index = index.clamp(0, values.shape[1] - 1)
    picked = values.gather(1, index[:, None]).squeeze(1)
    return torch.where(owned, picked, torch.zeros_like(picked)), (index, owned)


def weighted_cross_entropy(
    hidden: Tensor,
    vocab_weight: Tensor,
    labels: Tensor,
    *,
    row_weights: Tensor,
    vocab_size: int,
    loss_chunk_tokens: int,
    ports: HeadPorts,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of supervised rows, summed with weights.

    Args:
        hidden: [r, H], final hidden states after `ports.gather_hidden`.
        vocab_weight: [V, H], output projection of this rank; rows that pad it must be finite, and are zero.
        labels: int64 [r], global token ids.
        row_weights: [r], weight of each row's loss.
        vocab_size: entries of the whole vocabulary; rows beyond it are padding and get no probability.
        loss_chunk_tokens: rows whose logits exist at a time.
        ports: collectives over tp.

    Returns:
        total: [], sum of weight * loss, differentiable once in `hidden` and `vocab_weight`.
        losses: [r], for reports, without gradients. Both float32 (float64 for float64 input).
    """
    rows_of_rank = min(max(vocab_size - ports.vocab_start_index, 0), len(vocab_weight))
    return _ChunkedCrossEntropy.apply(
        hidden,
        vocab_weight,
        labels,
        row_weights,
        rows_of_rank,
        loss_chunk_tokens,
        ports,
        torch.is_grad_enabled(),
    )
