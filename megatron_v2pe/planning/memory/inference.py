"""Memory of generation and evaluation: weights, the cache of keys and values, and the prefill of a long prompt.

    total = weights + KV cache + most of (tower forward, a decoder layer forward, logits of one token)

Nothing is kept for backward. A prompt is prefilled in one pass; context parallel ranks share it and its cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_v2pe.planning.memory.activations import decoder_stack
from megatron_v2pe.planning.memory.operations import FLOAT_BYTES
from megatron_v2pe.planning.memory.parameters import model_chunk_parameters
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.memory.vision import VisionShape, vision_peaks
from megatron_v2pe.planning.request.hardware import GIB, Hardware
from megatron_v2pe.planning.request.stages import ModelChunk


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes of one pipeline rank while it answers a prompt."""

    weights_bytes: float
    kv_cache_bytes: float
    prefill_bytes: float
    prefill_part: str
    reserved_bytes: float

    @property
    def total_bytes(self) -> float:
        """All of them."""
        return self.weights_bytes + self.kv_cache_bytes + self.prefill_bytes + self.reserved_bytes


def kv_cache_bytes(setting: Setting, num_layers: int, prompt_tokens: int) -> float:
    """2 (keys, values) * layers * KV channels of a tp rank * tokens of a cp rank * e."""
    language, plan = setting.arch.language, setting.plan
    width = language.num_kv_heads * language.head_dim / plan.tp
    return 2.0 * num_layers * width * prompt_tokens / plan.cp * setting.element_bytes


def inference_memory(
    setting: Setting, model_chunks: tuple[ModelChunk, ...], hardware: Hardware
) -> InferenceMemory:
    """One pipeline rank; `setting.pack` is the prompt, sequence parallelism is off as in the engine."""
    plan = replace(setting.plan, sequence_parallel=False)
    setting = replace(setting, plan=plan, pack=setting.pack.padded(plan))
    model_chunk = ModelChunk(
        num_layers=sum(model_chunk.num_layers for model_chunk in model_chunks),
        is_first=model_chunks[0].is_first,
        is_last=model_chunks[-1].is_last,
    )
    weights = sum(
        size
        for part in model_chunks
        for _, size in model_chunk_parameters(setting.arch, plan, part, setting.config.lora)
    )
    hidden = setting.tokens * setting.arch.language.hidden_size * setting.element_bytes
    moments = {"decoder layer": decoder_stack(setting, 1).inference_bytes + hidden}
    if model_chunk.is_last:
        moments["logits"] = hidden + setting.arch.language.vocab_size * FLOAT_BYTES
    if model_chunk.is_first:
        shape = VisionShape(
            tiles=setting.tiles,
            tower_tp=plan.tower_tp,
            is_trained=False,
            trains_projector=False,
            projector=setting.costs("projector"),
        )
        tower = vision_peaks(setting.arch, setting.config.vision, shape, setting.costs("vision"))
        pixels = 3 * setting.arch.image_size**2 * setting.tiles * setting.element_bytes
        moments["vision tower"] = pixels + hidden + tower.forward_bytes
    largest = max(moments, key=lambda name: moments[name])
    return InferenceMemory(
        weights_bytes=weights * setting.element_bytes,
        kv_cache_bytes=kv_cache_bytes(setting, model_chunk.num_layers, setting.pack.num_tokens),
        prefill_bytes=moments[largest],
        prefill_part=largest,
        reserved_bytes=hardware.reserved_gib * GIB,
    )
