"""Adapters under the parallel plan: for each part and role of a layer, what is fused and what ranks exchange.

config.lora + names of the architecture -> LinearAdapters of each role -> BackendModules whose linears have adapters
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import Part, adapted_names, linear_names
from megatron_v2pe.config.schema import LoRAConfig
from megatron_v2pe.models.layers.layer_specs import BackendModules
from megatron_v2pe.models.layers.lora import FusedPart, LinearAdapters, with_adapters

ROW_ROLES = ("linear_proj", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class PartSplit:
    """How a part of the model lies on the tensor parallel ranks.

    Attributes:
        group: ranks that share the part's linears; of one rank where the part is whole.
        sequence_parallel: activations between its layers are split over the group.
        inputs_differ: ranks of the tensor parallel axis feed it different inputs (tiles).
    """

    group: ProcessGroup
    sequence_parallel: bool
    inputs_differ: bool


def adapted_modules(
    modules: BackendModules, part: Part, *, lora: LoRAConfig, arch: InternVLArchitecture, split: PartSplit
) -> BackendModules:
    """The modules of a part of the model, with adapters on the linears that `lora` names."""
    chosen = adapted_names(lora, part, arch)
    linears = {}
    for role, names in linear_names(part, arch).items():
        adapted = tuple(name for name in names if name in chosen)
        if adapted:
            parts, group_rows = fused_parts(part, role, names, arch)
            spec = LinearAdapters(
                parts=parts,
                group_rows=group_rows,
                adapted=adapted,
                rank=lora.rank_of(part),
                scale=lora.alpha_of(part) / lora.rank_of(part),
                dropout=lora.dropout,
                is_row=role in ROW_ROLES,
                exchange=_exchange(split, is_row=role in ROW_ROLES),
                dropout_generator=_dropout_generator(split, is_row=role in ROW_ROLES),
            )
            linears[role] = with_adapters(getattr(modules, role), spec)
    return replace(modules, **linears)


def fused_parts(
    part: Part, role: str, names: tuple[str, ...], arch: InternVLArchitecture
) -> tuple[tuple[FusedPart, ...], int]:
    """How Hugging Face linears are fused in one of ours, and the rows of a group (0 without groups)."""
    if part == "language" and role == "linear_fc1":  # gate above up, on every rank
        return tuple(FusedPart(name=name, blocks=2 // len(names)) for name in names), 0
    if len(names) == 1:
        return (FusedPart(name=names[0]),), 0
    language = arch.language
    shares = (language.num_heads // language.num_kv_heads, 1, 1)
    parts = tuple(FusedPart(name=name, share=share) for name, share in zip(names, shares, strict=True))
    return parts, sum(shares) * language.head_dim


def _exchange(split: PartSplit, *, is_row: bool) -> Callable[[Tensor], Tensor]:
    """The collective between A and B; its backward is the other one of its pair."""
    group = split.group
    if group.size() == 1:
        return _identity
    if is_row and split.sequence_parallel:
        return partial(mappings.reduce_scatter_to_sequence_parallel_region, group=group)
    if is_row:
        return partial(mappings.reduce_from_tensor_model_parallel_region, group=group)
    if split.sequence_parallel:
        # B's rows differ by rank, so what comes back is summed.
        return partial(
            mappings.gather_from_sequence_parallel_region, tensor_parallel_output_grad=True, group=group
        )
    return partial(mappings.copy_to_tensor_model_parallel_region, group=group)


def _identity(x: Tensor) -> Tensor:
    return x


def _dropout_generator(
    split: PartSplit, *, is_row: bool
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """mcore's generator that differs between tp ranks where their inputs do; equal inputs need equal masks."""
    is_split = split.group.size() > 1 and (is_row or split.sequence_parallel)
    return get_cuda_rng_tracker().fork if is_split or split.inputs_differ else contextlib.nullcontext
