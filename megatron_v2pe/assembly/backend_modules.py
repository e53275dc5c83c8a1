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


def choose_modules(
    parallel: ParallelConfig, *, dtype: str, fp8: str = "none", sinks: bool = False
) -> BackendModules:
    """Modules for `parallel.attention_backend`.

    `auto` is Transformer Engine in bfloat16 only. Its products of float32 matrices round to tf32 (10 bits), and its
    fused attention supports half precision only, so that float32 would be inexact on one rank and refused on several.

    A decoder with sinks has native attention among Transformer Engine's layers, which have none for packed sequences.

    Args:
        parallel: names the back end, and how ranks share a sequence.
        dtype: `runtime.dtype`.
        fp8: `model.fp8`.
        sinks: each query head of the decoder has a logit that joins its softmax.

    Raises:
        ConfigError: Transformer Engine is asked for by name and cannot run here, or what `auto` found cannot share a
            sequence as `parallel.cp_comm_type` asks, or has no FP8 products on this GPU.
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
        if fp8 != "none":
            raise ConfigError(
                f"model.fp8 is {fp8!r}, but FP8 products are Transformer Engine's, and "
                + ("it is not installed" if torch.cuda.is_available() else "this host has no GPU")
                + "; install the extra 'gpu' on a GPU host, or set model.fp8 to none"
            )
        check_comm_type(parallel.cp_comm_type, "native")
        return local_modules(
            language_attention=NativeContextAttention, vision_attention=NativeContextAttention
        )
    attention = "native" if sinks else "transformer_engine"
    check_comm_type(parallel.cp_comm_type, attention)
    check_sharding(parallel, attention)
    if fp8 != "none":
        check_fp8_products(fp8)
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    if sinks:
        logger.info("Transformer Engine has no sinks for packed sequences: the decoder's attention is native")
        return transformer_engine_modules(
            language_attention=NativeContextAttention, vision_attention=TEDotProductAttention
        )
    from megatron_v2pe.parallel.attention.te import RotaryTEAttention

    return transformer_engine_modules(
        language_attention=RotaryTEAttention, vision_attention=TEDotProductAttention
    )


def check_fp8_products(fp8: str) -> None:
    """Ask Transformer Engine whether this GPU has the products of `model.fp8`.

    Raises:
        ConfigError: it has not; in Transformer Engine's words.
    """
    import transformer_engine.pytorch as te

    available = te.is_fp8_block_scaling_available if fp8 == "blockwise" else te.is_fp8_available
    is_there, reason = available(return_reason=True)
    if not is_there:
        raise ConfigError(
            f"model.fp8 is {fp8!r}, but Transformer Engine says: {reason.rstrip('.')}; set model.fp8 to "
            + ("current or none" if fp8 == "blockwise" else "none")
        )
