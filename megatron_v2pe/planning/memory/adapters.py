"""Adapters of a linear: which pairs (A, B) there are, and how many numbers a rank holds of them.

    column linear   A [rank, in]        B [rows of the part on this rank, rank]
    row linear      A [rank, in / tp]   B [out, rank]

A fused linear has one pair for each Hugging Face linear in it (`models/layers/lora.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import ADAPTERS, Part, adapted_names, linear_names
from megatron_v2pe.config.schema import LoRAConfig

ParameterSize = tuple[str, int]
NO_LORA = LoRAConfig()


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters of a part of the model.

    Attributes:
        rank: of every pair; 0 without adapters.
        roles: for each linear of a layer its Hugging Face linears: (name, share of the rows, has an adapter).
    """

    rank: int = 0
    roles: tuple[tuple[str, tuple[tuple[str, int, bool], ...]], ...] = ()

    def parameters(self, linear: str, *, rows: int, columns: int) -> Iterator[ParameterSize]:
        """Pairs of the linear called `linear`, whose weight is [rows, columns] on this rank."""
        role = linear.rpartition(".")[2]
        parts = dict(self.roles).get(role, ())
        unit = rows // max(1, sum(share for _, share, _ in parts))
        for name, share, is_adapted in parts:
            if is_adapted:
                prefix = f"{linear}.{ADAPTERS}.{name.replace('.', '_')}"
                yield f"{prefix}.lora_A", self.rank * columns
                yield f"{prefix}.lora_B", unit * share * self.rank

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """Linears of a layer that have any adapter, and how many."""
        counts = ((role, sum(adapted for _, _, adapted in parts)) for role, parts in self.roles)
        return tuple((role, count) for role, count in counts if count)


NO_ADAPTERS = Adapters()


def planned_adapters(lora: LoRAConfig, part: Part, arch: InternVLArchitecture) -> Adapters:
    """Adapters of a part of the model."""
    chosen = adapted_names(lora, part, arch)
    if not chosen:
        return NO_ADAPTERS
    queries_per_key = arch.language.num_heads // arch.language.num_kv_heads
    roles = []
    for role, names in linear_names(part, arch).items():
        shares = (queries_per_key, 1, 1) if len(names) == 3 else (1,) * len(names)
        parts = tuple((name, share, name in chosen) for name, share in zip(names, shares, strict=True))
        roles.append((role, parts))
    return Adapters(rank=lora.rank_of(part), roles=tuple(roles))
