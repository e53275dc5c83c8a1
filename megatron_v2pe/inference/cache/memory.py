"""What an answer needs in memory beside the weights, as the planner says and the engine checks before prefill.

    cache    2 * layers * KV heads of a tp rank * d * bytes * rows of a cp rank
    chunk    the most of  tower on a slice of tiles,  a decoder layer and attention on a chunk's local tokens

Pure numbers; nothing here asks a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.plan import ParallelPlan

KVKind = Literal["model", "int8", "fp8"]  # how keys and values are stored
KV_KINDS: tuple[KVKind, ...] = ("model", "int8", "fp8")
SCALE_BYTES = 2  # of an 8-bit row and head


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the memory of a prefill chunk on one rank depends on, beside the chunk.

    Attributes:
        config: with which the model was built.
        arch: its architecture.
        plan: sizes of the axes.
        num_layers: decoder layers of this pipeline stage.
        is_first: it embeds tokens and encodes tiles.
        is_last: it has the head.
        on_cpu: torch's CPU costs.
    """

    config: RunConfig
    arch: InternVLArchitecture
    plan: ParallelPlan
    num_layers: int
    is_first: bool
    is_last: bool
    on_cpu: bool


PrefillBytes = Callable[[int, int], tuple[str, float]]
"""(tokens, tiles) of a prefill chunk -> what takes the most memory at a time on this rank, and its bytes."""

PlanPrefill = Callable[[Stage], PrefillBytes]
"""The planner's side of the check; it lies above `inference`, so it is handed in."""


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one rank's cache is made of.

    Attributes:
        layers: of this pipeline stage.
        kv_heads: of this tensor parallel rank.
        head_dim: channels of a head.
        element_bytes: of a stored number, 1 for int8 and fp8.
        is_scaled: rows have scales, in 8 bits.
    """

    layers: int
    kv_heads: float
    head_dim: int
    element_bytes: int
    is_scaled: bool = False

    @property
    def row_bytes(self) -> float:
        """Bytes of a token's keys and values on this rank."""
        row = self.head_dim * self.element_bytes + (SCALE_BYTES if self.is_scaled else 0)
        return 2.0 * self.layers * self.kv_heads * row


def kv_shape(
    arch: InternVLArchitecture, *, layers: int, tp: int, element_bytes: int, kind: KVKind
) -> KVShape:
    """Shape of the cache of a stage with that many layers."""
    language = arch.language
    return KVShape(
        layers=layers,
        kv_heads=language.kv_heads_of_rank(tp),
        head_dim=language.head_dim,
        element_bytes=element_bytes if kind == "model" else 1,
        is_scaled=kind != "model",
    )
