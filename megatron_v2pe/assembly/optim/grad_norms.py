"""Gradient norm of each part of the model, and with it whether any gradient is not finite: before anything is updated.

    main gradients (this rank's shard) --squares--> vision, projector, language --one sum over the world--> norms
    their root sum of squares --clip_gradients--> scaled gradients, ready for `step_with_ready_grads`

The optimizer's own `step` would prepare the gradients and reduce their squares over the ranks once more.

A sum of squares is NaN or Inf as soon as one element is, so three numbers show every rank the same. A finite element
beyond 1.8e19 counts as Inf: its square overflows float32, as in megatron-core's own norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_v2pe.models.internvl import InternVL

PART_ORDER = ("vision", "projector", "language")  # of the sums, and of the line of a step


PartShards = dict[str, list[Tensor]]
"""Part to the slices of its parameters that this rank updates."""


def counted_shards(optimizer: MegatronOptimizer, model_chunks: Sequence[InternVL]) -> PartShards:
    """The slices whose gradients `grad_norms` adds up, by part; they stay the same as long as the optimizer lives.

    Args:
        optimizer: mcore's distributed optimizer.
        model_chunks: bare model chunks of this rank.
    """
    part_of = {
        id(parameter): part
        for model_chunk in model_chunks
        for part in PART_ORDER
        if (module := getattr(model_chunk, part)) is not None
        for parameter in module.parameters()
    }
    shards: PartShards = {part: [] for part in PART_ORDER}
    for weight, shard in _shards(optimizer):
        if _is_counted(shard, optimizer):
            shards[part_of[id(weight)]].append(shard)
    return shards


def grad_norms(optimizer: MegatronOptimizer, shards: PartShards, *, device: torch.device) -> dict[str, float]:
    """Norm of the reduced gradients of each part, before clipping. Collective.

    Args:
        optimizer: mcore's distributed optimizer; the gradients of its shards are set here (`prepare_grads`).
        shards: `counted_shards` of it.
        device: where the numbers are summed.

    Returns:
        Part to norm, equal on every rank; 0.0 for a frozen part, not finite where a gradient is not.
    """
    optimizer.prepare_grads()
    grads = {part: [shard.grad for shard in own if shard.grad is not None] for part, own in shards.items()}
    squares = torch.stack([_sum_of_squares(grads[part], device) for part in PART_ORDER])
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return dict(zip(PART_ORDER, squares.sqrt().tolist(), strict=True))


def clip_gradients(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale gradients that are prepared down to the optimizer's `clip_grad`; 0 clips nothing. No collective.

    Args:
        optimizer: mcore's distributed optimizer, after `grad_norms`.
        grad_norm: of all parts together, equal on every rank.
    """
    for single in trained_optimizers(optimizer):
        # mcore's coefficient; its own loop on torch makes a copy of every gradient.
        coefficient = single.config.clip_grad / (grad_norm + 1.0e-6)
        if single.config.clip_grad > 0 and coefficient < 1.0:
            grads = [shard.grad for shard in single.get_parameters() if shard.grad is not None]
            if grads:
                torch._foreach_mul_(grads, coefficient)


def trained_optimizers(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers it is made of, except those of stages on which nothing is trained."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(single, "is_stub_optimizer", False):
            yield single


def _shards(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of which this rank updates a slice, with the float32 slice that the optimizer sees."""
    for single in trained_optimizers(optimizer):
        pairs = (
            (single.model_float16_groups, single.shard_fp32_from_float16_groups),
            (single.model_fp32_groups, single.shard_fp32_groups),
        )
        for weights, shards in pairs:
            for weight_group, shard_group in zip(weights, shards, strict=True):
                yield from zip(weight_group, shard_group, strict=True)


def _is_counted(shard: Tensor, optimizer: MegatronOptimizer) -> bool:
    """Copies on other ranks of tied and of whole weights count once, as in mcore's own norm."""
    tp_group = getattr(optimizer, "tp_group", None)
    return param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(shard, tp_group)


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Float64 []; each tensor's norm is taken in float32."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(grads))
    return norms.double().square().sum()
