"""Whether a prompt's keys and values fit where they have to be, said before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.memory import kv_shape
from megatron_v2pe.inference.chunks import PrefillChunk
from megatron_v2pe.inference.runner import ModelRunner
from megatron_v2pe.parallel.device_memory import free_bytes
from megatron_v2pe.parallel.replica import least

_GIB = 2**30


def check_memory(runner: ModelRunner, chunks: Sequence[PrefillChunk], *, new_tokens: int, kind: str) -> None:
    """Refuse a prompt whose cache would not fit, before anything of it is computed. Collective.

    Raises:
        ConfigError: on all ranks alike, with what is needed, what is free and what would fit.
    """
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
