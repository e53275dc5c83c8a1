"""Whether a prompt fits where it has to be, said before anything is computed.

    free now  >=  keys and values of prompt and answer  +  the largest moment of a prefill chunk

Weights are there already. The moment is the planner's figure (`plan --inference`), where a planner was handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.memory import KVKind, KVShape, PrefillBytes, kv_shape
from megatron_v2pe.inference.chunks import PrefillChunk
from megatron_v2pe.inference.runner import ModelRunner
from megatron_v2pe.parallel.replica import least
from megatron_v2pe.parallel.runtime.device_memory import free_bytes

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Bytes of this rank.

    Attributes:
        tokens: of prompt and answer that are new.
        layers: of this stage.
        shape: of the cache.
        rows: of the cache on this rank.
        part: what is largest in a prefill chunk.
        chunk: bytes of it.
        weights: bytes that are loaded.
        free: bytes that may still be allocated.
    """

    tokens: int
    layers: int
    shape: KVShape
    rows: int
    part: str
    chunk: float
    weights: int
    free: float

    def text(self, room: int, cp: int) -> str:
        """What is needed, what is free, what would fit, and the ways out."""
        shape = self.shape
        moment = (
            f" and the largest moment of a prefill chunk ({self.part}) {_gib(self.chunk)}"
            if self.part
            else ""
        )
        return (
            f"the prompt and its answer add {self.tokens} tokens: beside the weights ({_gib(self.weights)}, loaded) "
            f"keys and values take {_gib(self.rows * shape.row_bytes)} on each rank (2 * {self.layers} layers * "
            f"{shape.kv_heads:g} KV heads * {shape.head_dim} * {shape.element_bytes} bytes, over --cp {cp}){moment}, "
            f"but {_gib(self.free)} are free here; {room} tokens would fit. Raise --cp, --tp or --pp, store keys and "
            f"values in 8 bits (--kv int8), {'lower --chunk-tokens, ' if self.part else ''}or shorten the prompt"
        )


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def check_memory(
    runner: ModelRunner,
    chunks: Sequence[PrefillChunk],
    *,
    new_tokens: int,
    kind: KVKind,
    prefill_bytes: PrefillBytes | None,
) -> None:
    """Refuse a prompt that would not fit, before anything of it is computed. Collective.

    Args:
        runner: the model on this rank.
        chunks: what is to be prefilled.
        new_tokens: of all answers to it.
        kind: how keys and values are stored.
        prefill_bytes: of a chunk, as the planner says; None counts keys and values alone.

    Raises:
        ConfigError: on all ranks, with what this one needs, what is free and what would fit on all.
    """
    need = _need(runner, chunks, new_tokens=new_tokens, kind=kind, prefill_bytes=prefill_bytes)
    cp, row = runner.plan.cp, need.shape.row_bytes
    room = max(0.0, need.free - need.chunk) / row * cp if row else float("inf")
    room = least(room, ranks=runner.ranks)
    if need.tokens > room:
        raise ConfigError(need.text(int(room), cp))


def _need(
    runner: ModelRunner,
    chunks: Sequence[PrefillChunk],
    *,
    new_tokens: int,
    kind: KVKind,
    prefill_bytes: PrefillBytes | None,
) -> _Need:
    plan, layers = runner.plan, len(runner.model.language.decoder.layers)
    tokens = chunks[-1].stop - chunks[0].start + new_tokens
    part, chunk = "", 0.0
    if prefill_bytes is not None:
        tiles = max(chunk.last_tile - chunk.first_new for chunk in chunks)
        part, chunk = prefill_bytes(max(chunk.padded for chunk in chunks), tiles)
    element = runner.dtype.itemsize
    # Ranks of one host share its memory; a GPU is a rank's own.
    sharers = 1 if runner.device.type == "cuda" else launcher().local_size
    return _Need(
        tokens=tokens,
        layers=layers,
        shape=kv_shape(runner.arch, layers=layers, tp=plan.tp, element_bytes=element, kind=kind),
        rows=-(-tokens // plan.cp),
        part=part,
        chunk=chunk,
        weights=sum(weight.numel() * weight.element_size() for weight in runner.model.parameters()),
        free=free_bytes(runner.device) / sharers,
    )
