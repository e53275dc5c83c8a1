"""Which back end runs the layers: Transformer Engine, or mcore's local layers with native attention."""

from __future__ import annotations

import logging

import torch

from megatron_v2pe.assembly.environment import has_module
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.config.validate import check_comm_type, check_sharding
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.layers.layer_specs import BackendModules, local_modules, transformer_engine_modules
from megatron_v2pe.parallel.attention.native import NativeContextAttention

logger = logging.getLogger(__name__)


def choose_modules(parallel: ParallelConfig, *, dtype: str) -> BackendModules:
    """Modules for `parallel.attention_backend`.

    `auto` is Transformer Engine in bfloat16 only. Its products of float32 matrices round to tf32 (10 bits), and its
    fused attention supports half precision only, so that float32 would be inexact on one rank and refused on several.

    Args:
        parallel: names the back end, and how ranks share a sequence.
        dtype: `runtime.dtype`.

    Raises:
        ConfigError: Transformer Engine is asked for by name and cannot run here, or what `auto` found cannot share a
            sequence as `parallel.cp_comm_type` asks.
    """
    backend = parallel.attention_backend
    available = torch.cuda.is_available() and has_module("transformer_engine")
    if backend == "transformer_engine" and not available:
        raise ConfigError(
            "parallel.attention_backend is 'transformer_engine', but "
            + ("Transformer Engine is not installed" if torch.cuda.is_available() else "this host has no GPU")
            + "; install the extra 'gpu' on a GPU host, or set parallel.attention_backend to native or auto"
        )
    if backend == "native" or not available or (backend == "auto" and dtype != "bfloat16"):
        if backend == "auto" and torch.cuda.is_available() and not available:
            logger.warning("Transformer Engine is not installed: running the slower native attention")
        check_comm_type(parallel.cp_comm_type, "native")
        return local_modules(
            language_attention=NativeContextAttention, vision_attention=NativeContextAttention
        )
    check_comm_type(parallel.cp_comm_type, "transformer_engine")
    check_sharding(parallel, "transformer_engine")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from megatron_v2pe.parallel.attention.te import RotaryTEAttention

    return transformer_engine_modules(
        language_attention=RotaryTEAttention, vision_attention=TEDotProductAttention
    )
