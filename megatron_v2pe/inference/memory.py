"""What an answer needs in memory beside the weights, as the planner says and the engine checks before prefill.

    cache    2 * layers * KV heads of a tp rank * d * bytes * rows of a cp rank
    chunk    the most of  tower on a slice of tiles,  a decoder layer and attention on a chunk's local tokens

Pure numbers; nothing here asks a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_v2pe.inference.chunks import PrefillChunk
    from megatron_v2pe.inference.runner import ModelRunner

SCALE_BYTES = 2  # of an 8-bit row and head
_GIB = 2**30


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


def kv_shape(arch: InternVLArchitecture, *, layers: int, tp: int, element_bytes: int, kind: str) -> KVShape:
    """Shape of the cache of a stage with that many layers."""
    language = arch.language
    return KVShape(
        layers=layers,
        kv_heads=language.num_kv_heads / tp,
        head_dim=language.head_dim,
        element_bytes=element_bytes if kind == "model" else 1,
        is_scaled=kind != "model",
    )


def check_memory(runner: ModelRunner, chunks: Sequence[PrefillChunk], *, new_tokens: int, kind: str) -> None:
    """Refuse a prompt whose cache would not fit, before anything of it is computed. Collective.

    Raises:
        ConfigError: on all ranks alike, with what is needed, what is free and what would fit.
    """
    from megatron_v2pe.parallel.device_memory import free_bytes
    from megatron_v2pe.parallel.replica import least

    plan = runner.plan
    layers = len(runner.model.language.decoder.layers)
    element = runner.dtype.itemsize
    shape = kv_shape(runner.arch, layers=layers, tp=plan.tp, element_bytes=element, kind=kind)
    tokens = chunks[-1].stop - chunks[0].start + new_tokens
    rows = -(-tokens // plan.cp)
    needed, free = rows * shape.row_bytes, free_bytes(runner.device)
    room = free / shape.row_bytes * plan.cp if shape.row_bytes else float("inf")
    room = least(room, ranks=runner.ranks)
    if tokens > room:
        raise ConfigError(
            f"the prompt and its answer add {tokens} tokens, whose keys and values take "
            f"{needed / _GIB:.2f} GiB on each rank (2 * {layers} layers * {shape.kv_heads:g} KV heads * "
            f"{shape.head_dim} * {shape.element_bytes} bytes, over --cp {plan.cp}), but {free / _GIB:.2f} GiB are "
            f"free here; {int(room)} tokens would fit. Raise --cp, --tp or --pp, store them in 8 bits (--kv int8), "
            "or shorten the prompt"
        )
